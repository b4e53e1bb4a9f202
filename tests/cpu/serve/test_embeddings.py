"""Vectors of texts: against Hugging Face's own hidden states, through the engine, the wire and the endpoint."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from penstock import LLM, SamplingParams
from penstock.compiler.refit import refit
from penstock.errors import ConfigError, OptionError, PenstockError, UnsupportedError
from penstock.grammar.compiled import Compiled
from penstock.models.pooling import open_for
from penstock.serve import routes
from penstock.serve.app import create_app
from penstock.serve.config import ServeConfig
from penstock.serve.engine.desk import Desk
from penstock.serve.engine.facts import facts_of
from penstock.serve.link import Reply
from penstock.serve.routes.embeddings import ROUTES
from penstock.serve.wire import Part, Submit
from tests.cpu.serve.doubles import StillEngine, app_of, client_of
from tests.cpu.tiny import SHAPE, write

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], list(range(20, 140)), [3, 1, 4, 1, 5, 9, 2, 6]]


def asked(*prompts: list[int]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": each} for each in prompts]


def qwen3(directory: Path) -> Path:
    torch.manual_seed(1)
    shape = {k: v for k, v in SHAPE.items() if not k.endswith("token_id")}
    Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)).save_pretrained(directory)
    return directory


def gpt2(directory: Path) -> Path:
    torch.manual_seed(2)
    GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=256, bos_token_id=0, eos_token_id=1)
    ).save_pretrained(directory)
    return directory


def headless(directory: Path) -> Path:
    """As sentence-transformers saves it: without the head, and what names of the whole begin with."""
    LlamaForCausalLM.from_pretrained(write(directory / "whole")).model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / "whole" / name, directory / name)
    return directory


@pytest.mark.parametrize("made", [write, qwen3, gpt2, headless])
def test_vectors_are_hugging_faces(tmp_path: Path, made: Any) -> None:
    model = made(tmp_path / "model")
    reference = AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        rows = [reference(torch.tensor([each])).last_hidden_state[0, -1] for each in PROMPTS]
    with LLM(model, task="embed", device="cpu", skip_tokenizer_init=True, max_num_tokens=64, cache_dir=tmp_path) as llm:
        together = llm.embed(asked(*PROMPTS))
        alone = [llm.embed(asked(each))[0] for each in PROMPTS]
        again = llm.embed(asked(PROMPTS[2]))[0]
        assert llm.stats()["prefix_cache_hits"] > 0
    for row, vector, single in zip(rows, together, alone, strict=True):
        expected = torch.nn.functional.normalize(row, dim=-1).numpy()
        assert np.abs(vector - expected).max() < 1e-6 and vector.dtype == np.float32
        assert (vector == single).all()
    assert (again == together[2]).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("embed") / "tiny")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, task="embed", device="cpu", cache_dir=model.parent) as found:
        yield found


def test_sixteen_bits_are_close(model: Path, llm: LLM) -> None:
    with LLM(model, task="embed", dtype="bfloat16", device="cpu", cache_dir=model.parent) as half:
        for a, b in zip(llm.embed(asked(*PROMPTS)), half.embed(asked(*PROMPTS)), strict=True):
            assert a @ b > 0.999


def test_each_task_has_its_own_calls(model: Path, llm: LLM, tmp_path: Path) -> None:
    for call in (lambda: llm.generate("In"), lambda: llm.generate("In", SamplingParams(use_beam_search=True))):
        with pytest.raises(OptionError, match="text was asked for, but the engine gives vectors"):
            call()
    with (
        LLM(model, device="cpu", cache_dir=model.parent) as plain,
        pytest.raises(OptionError, match=r"a vector was asked for, but the engine generates text.*task='embed'"),
    ):
        plain.embed("In")
    with pytest.raises(OptionError, match="task='rerank' is not one of"):
        LLM(model, task="rerank")


def test_an_engine_knows_its_task(llm: LLM, tmp_path: Path) -> None:
    saved = llm.save_engine(tmp_path / "engine")
    with pytest.raises(OptionError, match="task='generate', but the engine in"):
        LLM(saved, task="generate")
    other = write(tmp_path / "other", seed=5)
    with LLM(saved) as again:
        assert (again.embed("In the")[0] == llm.embed("In the")[0]).all()
    with LLM(refit(saved, other, tmp_path / "refitted")) as fitted:
        assert not np.allclose(fitted.embed("In the")[0], llm.embed("In the")[0])
    assert not any("head" in name for name in llm.engine.weights)


def sentence_transformers(directory: Path, pooling: str, *more: str) -> Path:
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **{f"{2 + i}": each for i, each in enumerate(more)}}
    modules = [
        {"idx": i, "path": p, "type": f"sentence_transformers.models.{k}"} for i, (p, k) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{name}": name == pooling for name in ("lasttoken", "cls_token", "mean_tokens")}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    return directory


def test_files_of_sentence_transformers_are_understood(tmp_path: Path) -> None:
    plain = sentence_transformers(write(tmp_path / "plain"), "lasttoken")
    assert open_for(plain, "auto")[1] == {"normalize": False} and open_for(plain, "generate")[1] == {}
    with LLM(plain, device="cpu", cache_dir=tmp_path) as llm:
        assert abs(np.linalg.norm(llm.embed("In the")[0]) - 1) > 0.1
    unit = sentence_transformers(write(tmp_path / "unit"), "lasttoken", "Normalize")
    assert open_for(unit, "auto")[1] == {"normalize": True}
    with pytest.raises(ConfigError, match="pooling_mode_mean_tokens is not implemented"):
        open_for(sentence_transformers(write(tmp_path / "mean"), "mean_tokens"), "auto")
    with pytest.raises(ConfigError, match="'Dense' is not implemented"):
        open_for(sentence_transformers(write(tmp_path / "dense"), "lasttoken", "Dense"), "auto")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=300).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["T5ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="an encoder-decoder is not built yet"):
        open_for(tmp_path, "embed")


class DeskEngine(StillEngine):
    """The engine process's own desk, without the process."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(facts=facts_of(llm, {"model": None}))
        self.llm = llm

    def submit(self, new: Submit, grammar: Compiled | None = None) -> Reply:
        return DeskReply(Desk(self.llm._loop), new)


class DeskReply:
    def __init__(self, desk: Desk, new: Submit) -> None:
        self._desk = desk
        desk.submit(new)

    async def parts(self) -> list[Part]:
        parts, failed = await asyncio.to_thread(self._desk.wait)
        if failed:
            raise {"PromptError": OptionError}.get(failed[0].kind, PenstockError)(failed[0].message)
        return parts

    def abort(self, index: int | None = None) -> None:
        pass


async def post(llm: LLM, **body: Any) -> httpx.Response:
    async with client_of(create_app(ServeConfig(max_prompts=4), DeskEngine(llm), routes=ROUTES)) as client:
        found: httpx.Response = await client.post("/v1/embeddings", json=body)
    return found


def test_texts_are_refused(llm: LLM) -> None:
    async def run() -> None:
        async with client_of(create_app(ServeConfig(), DeskEngine(llm), routes=routes.ROUTES)) as client:
            for path, body in (
                ("completions", {"prompt": "a"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ):
                found = await client.post(f"/v1/{path}", json=body)
                error = found.json()["error"]
                assert (found.status_code, error["code"]) == (400, "unsupported") and "--task embed" in error["message"]

    asyncio.run(run())


def test_the_official_client_reads_it(llm: LLM) -> None:
    texts = ["In the beginning", "A tuple"]

    async def run() -> None:
        app = create_app(ServeConfig(), DeskEngine(llm), routes=ROUTES)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://served")
        async with openai.AsyncOpenAI(api_key="x", base_url="http://served/v1", http_client=http) as client:
            packed = await client.embeddings.create(model="bundled", input=texts)
            plain = await client.embeddings.create(model="bundled", input=texts, encoding_format="float")
        for expected, a, b in zip(llm.embed(texts), packed.data, plain.data, strict=True):
            assert a.embedding == b.embedding == expected.tolist()
        ids = [llm.tokenizer.encode(text) for text in texts] if llm.tokenizer else []
        assert packed.usage.prompt_tokens == packed.usage.total_tokens == sum(map(len, ids))
        assert [each.index for each in packed.data] == [0, 1]

    asyncio.run(run())


def test_forms_of_input(llm: LLM) -> None:
    async def run() -> None:
        one = (await post(llm, input=[3, 1, 4])).json()["data"]
        several = (await post(llm, input=[[3, 1, 4], [5, 6]])).json()["data"]
        assert one[0]["embedding"] == several[0]["embedding"] and len(several) == 2
        short = (await post(llm, input=[3, 1, 4], dimensions=8, encoding_format="base64")).json()["data"][0][
            "embedding"
        ]
        vector = np.frombuffer(base64.b64decode(short), "<f4")
        whole = np.array(one[0]["embedding"][:8], np.float32)
        assert len(vector) == 8 and np.abs(vector - whole / np.linalg.norm(whole)).max() < 1e-6

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "prompt"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 1]}, "not mixed"),
        ({"input": [4000]}, "outside the vocabulary"),
        ({"input": [-1]}, "outside the vocabulary"),
        ({"input": ["a"] * 5}, "at most 4"),
        ({"input": "a", "dimensions": 65}, "vectors have 64"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate": True}, "truncate"),
        ({"input": "a" * 3000}, "tokens"),
    ],
)
def test_bad_requests_are_refused(llm: LLM, body: dict[str, Any], says: str) -> None:
    found = asyncio.run(post(llm, **body))
    assert found.status_code == 400 and says in found.json()["error"]["message"]


def test_an_engine_that_generates_has_none() -> None:
    async def run() -> None:
        async with client_of(app_of(*ROUTES)) as client:
            found = await client.post("/v1/embeddings", json={"input": "a"})
        assert found.status_code == 400 and "--task embed" in found.json()["error"]["message"]

    asyncio.run(run())
