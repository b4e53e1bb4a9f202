"""Beam search through the whole runtime: texts, scores and ranks are those of Hugging Face's generate."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.errors import SamplingError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend

PROMPTS = ([5, 9, 5, 9, 7, 30, 41], [17] * 3, list(range(40, 110)), [8])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    limits = {"max_batch_size": 16, "max_num_tokens": 48}
    with LLM(tiny_model, device="cpu", dtype="float32", cache_dir=tmp_path_factory.mktemp("cache"), **limits) as llm:
        yield llm


@torch.no_grad()
def searched(model: Any, prompt: list[int], new: int, eos: Any = 1, **asked: Any) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, eos_token_id=eos,
        max_new_tokens=new, return_dict_in_generate=True, output_scores=True, **asked,
    )  # fmt: skip
    texts = [row[len(prompt) :].tolist() for row in out.sequences]
    return [(_unpadded(text, eos), float(score)) for text, score in zip(texts, out.sequences_scores, strict=True)]


def _unpadded(text: list[int], eos: Any) -> list[int]:
    ends = {eos} if isinstance(eos, int) else set(eos)
    end = next((i + 1 for i, token in enumerate(text) if token in ends), len(text))
    return text[:end]


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n": 2}, {"num_beams": 2, "num_return_sequences": 2}),
    ({"beam_width": 4, "n": 4}, {"num_beams": 4, "num_return_sequences": 4}),
    (
        {"beam_width": 3, "n": 2, "length_penalty": 0.0, "early_stopping": True},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "early_stopping": True},
    ),
    (
        {"beam_width": 5, "n": 3, "length_penalty": 2.0, "early_stopping": "never"},
        {"num_beams": 5, "num_return_sequences": 3, "length_penalty": 2.0, "early_stopping": "never"},
    ),
    (
        {"beam_width": 4, "n": 2, "no_repeat_ngram_size": 2, "min_tokens": 5},
        {"num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), CASES)
@pytest.mark.parametrize("bias", [0.0, 4.0])  # of the end, so that some texts end and others do not
def test_beams_are_those_of_hugging_face(
    llm: LLM, model: Any, ours: dict[str, Any], theirs: dict[str, Any], bias: float
) -> None:
    params = SamplingParams(use_beam_search=True, max_tokens=70, logit_bias={1: bias}, **ours)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        want = searched(model, prompt, 70, sequence_bias=[[[1], bias]] if bias else None, **theirs)
        assert [list(each.token_ids) for each in output.outputs] == [text for text, _ in want]
        assert [each.score for each in output.outputs] == pytest.approx([score for _, score in want], rel=1e-5)
        assert [each.index for each in output.outputs] == list(range(params.n))
        assert all(each.finish_reason == ("stop" if each.token_ids[-1] == 1 else "length") for each in output.outputs)
    stats = llm.stats()
    assert stats["kv_cache_usage"] == stats["requests_running"] == 0


def test_sixteen_beams(llm: LLM, model: Any) -> None:
    output = llm.generate({"prompt_token_ids": PROMPTS[0]}, SamplingParams(use_beam_search=True, n=16, max_tokens=30))
    want = searched(model, PROMPTS[0], 30, num_beams=16, num_return_sequences=16)
    assert [list(each.token_ids) for each in output[0].outputs] == [text for text, _ in want]


@pytest.mark.parametrize(("blocks", "in_flight"), [(40, 1), (40, 2), (10, 2)])
def test_searches_beside_others_are_as_alone(tiny_engine: Path, blocks: int, in_flight: int) -> None:
    """Mixed with sampled and plain requests, in a pool that is too small for all of them."""
    engine = store.load(tiny_engine)
    beams = SamplingParams(use_beam_search=True, n=3, max_tokens=80)
    plain = SamplingParams(temperature=0.9, seed=4, max_tokens=180, ignore_eos=True)
    params = [plain, beams, plain, beams]

    def run(which: list[int], blocks: int, in_flight: int) -> tuple[dict[int, Any], Executor]:
        backend = CpuBackend(engine, tiny_engine)
        backend.num_blocks, backend.steps_in_flight = (blocks,), in_flight
        executor, done = Executor(engine, backend, None), queue.SimpleQueue[RequestOutput]()
        for i in which:
            executor.submit(Submission(str(i), tuple(range(2 + i, 60 + i)), params[i], done.put))  # type: ignore[arg-type]
        while executor.busy:
            executor.step()
        executor.scheduler.check()
        found = {int((output := done.get()).request_id): output.outputs for _ in which}
        return {i: [(c.token_ids, c.score) for c in texts] for i, texts in found.items()}, executor

    together, executor = run([0, 1, 2, 3], blocks, in_flight)
    for i in range(4):
        (alone,) = run([i], 40, 1)[0].values()
        assert together[i] == alone
    assert (executor.scheduler.counters.preemptions > 0) == (blocks == 10)


def test_text_and_what_is_refused(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=8)
    assert llm.tokenizer is not None
    for output in llm.generate("In the beginning", params):
        for each in output.outputs:
            whole = llm.tokenizer.decode([*output.prompt_token_ids, *each.token_ids])
            assert whole.endswith(each.text) and each.text
    with pytest.raises(SamplingError, match="needs the 33 likeliest tokens"):
        ends = tuple(range(2, 18))
        llm.generate("In", SamplingParams(use_beam_search=True, n=16, stop_token_ids=ends, max_tokens=4))


def test_a_search_is_cut_short_with_what_it_has(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=150)
    for timeout in (1e-9, 0.1):
        output = llm.generate({"prompt_token_ids": PROMPTS[2]}, params, timeout=timeout)[0]
        assert output.finished and {each.finish_reason for each in output.outputs} == {"timeout"}
    never = llm.generate({"prompt_token_ids": PROMPTS[2]}, params, timeout=1e-9)[0]
    assert never.outputs[0].token_ids == () and never.metrics.time_to_first_token is None
    assert llm.stats()["kv_cache_usage"] == 0
