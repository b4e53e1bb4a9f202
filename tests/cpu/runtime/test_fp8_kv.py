"""KV kept in fp8: half the bytes of 16 bits, text that stays close, and numbers that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock import LLM, SamplingParams, bundled
from penstock.compiler.build import build, read_model
from penstock.compiler.footprint import footprint
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.device import CPU, H200
from penstock.engine.manifest import Engine
from penstock.errors import ConfigError, OptionError
from penstock.formats.fp8 import FP8_E4M3
from penstock.ir.op import get
from penstock.models.config import stored_format
from penstock.runtime.step import CpuBackend
from penstock.text.tokenizer import Tokenizer
from tests.cpu.engines.test_bundled_engine import PROMPTS
from tests.cpu.runtime.test_independence import Job, _run
from tests.forced import Forced

JOBS = [Job(tuple(range(2 + i, 2 + i + length)), 0.0, 0, 12, i) for i, length in enumerate((1, 70, 33, 90, 16, 64))]
# Of the largest logit of a row. Each number of KV is rounded by at most a sixteenth, to either side alike, so that most
# of it averages out over heads and layers: it came to a twentieth. The bound is twice that.
LOGITS = 0.1


def _loaded(model: Path, cache: Path, tokens: int, **more: str) -> tuple[Engine, CpuBackend]:
    options = BuildOptions(device="cpu", cache_dir=cache, max_batch_size=4, max_num_tokens=tokens, **more)  # type: ignore[arg-type]
    directory = build(model, options)
    engine = store.load(directory)
    return engine, CpuBackend(engine, directory)


def test_tokens_do_not_depend_on_neighbours_or_chunks(tiny_model: Path, cache: Path) -> None:
    chunked, whole = (_loaded(tiny_model, cache, tokens, kv_cache_dtype="fp8") for tokens in (24, 128))
    alone = [_run(whole, [job])[0] for job in JOBS]
    assert _run(chunked, JOBS) == _run(whole, JOBS) == [_run(chunked, [job])[0] for job in JOBS] == alone


def test_logits_are_those_of_a_step_that_reads_its_own_tokens_back(tiny_model: Path, cache: Path) -> None:
    """A prompt in one chunk, and token by token: the same bits, so what a step appends is read rounded by it too."""
    engine, backend = _loaded(tiny_model, cache, 128, kv_cache_dtype="fp8")
    tokens = list(range(2, 60))
    (one,) = Forced(engine, backend).run([tokens], [len(tokens)])
    (each,) = Forced(engine, backend).run([tokens], [1])
    assert torch.equal(one[0], each[-1])


def test_the_pool_has_a_byte_a_number(tiny_model: Path, cache: Path) -> None:
    engine, backend = _loaded(tiny_model, cache, 24, kv_cache_dtype="fp8")
    wide, _ = _loaded(tiny_model, cache, 24)
    assert (engine.kv_format, engine.format, engine.formats) == ("fp8_e4m3", "f32", "f32, KV fp8_e4m3")
    assert wide.kv_format == wide.formats == "f32"
    assert engine.block_bytes * 4 == wide.block_bytes
    assert engine.work["kv_bytes_per_token"] * 4 == wide.work["kv_bytes_per_token"]
    assert {x.dtype for name, x in backend.states.items() if name != "slots"} == {torch.float8_e4m3fn}


def test_a_build_of_16_bits_for_a_gpu_halves_what_a_request_takes(tiny_model: Path) -> None:
    def request(kv: str) -> int:
        options = BuildOptions("bfloat16", device="cuda", kv_cache_dtype=kv)
        return int(footprint(read_model(tiny_model, options, H200).draft, H200)["kv_per_request"])

    assert 2 * request("fp8") == request("auto") == request("bfloat16")


def test_what_cannot_be_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    for asked, device, named in (
        ("int8", CPU, "is not one of auto, fp8"),
        ("float16", CPU, "computes in f32"),
        ("fp8", replace(H200, capability=80), "9.0 or above"),
    ):
        with pytest.raises(OptionError, match=named):
            read_model(tiny_model, BuildOptions(cache_dir=tmp_path, kv_cache_dtype=asked), device)
    assert not any(tmp_path.iterdir())


def test_weights_are_not_read_from_fp8() -> None:
    """A format of the KV pool: as weights it would need scales that are stored beside them."""
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        stored_format({"dtype": "float8_e4m3fn"})


def test_values_beyond_the_range_become_the_largest() -> None:
    kv = torch.zeros(2, 2, 1, 16, 4).to(torch.float8_e4m3fn)
    k = torch.tensor([[447.0, 1e6, -torch.inf, torch.nan], [0.01, -465.0, 464.0, 1.0]])
    zero = torch.zeros(2, dtype=torch.int32)
    table = torch.ones(1, 1, dtype=torch.int32)
    get("kv_append").reference(kv, k, -k, torch.tensor([0, 1], dtype=torch.int32), zero, table)
    keys = kv[1, 0, 0, :2].float()
    assert keys[0, :3].tolist() == [448.0, 448.0, -448.0] and keys[0, 3].isnan()
    assert keys[1].tolist() == [0.009765625, -448.0, 448.0, 1.0]
    assert torch.equal(kv[1, 1, 0, 1].float(), -keys[1])
    assert torch.finfo(getattr(torch, FP8_E4M3.torch_dtype)).max == 448.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    """The bundled model with float32 KV, and with fp8."""
    cache = tmp_path_factory.mktemp("cache")
    limits = {"device": "cpu", "dtype": "float32", "cache_dir": cache, "max_seq_len": 256}
    with LLM(**limits) as plain, LLM(**limits, kv_cache_dtype="fp8") as narrow:  # type: ignore[arg-type]
        yield plain, narrow


def test_the_bundled_models_text_stays_close(pair: tuple[LLM, LLM]) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    texts = [[o.outputs[0].token_ids for o in llm.generate(PROMPTS, params)] for llm in pair]
    same = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), 24) for a, b in zip(*texts, strict=True)
    ]
    assert sum(same) >= 48, f"of 24 tokens each, {same} agree before the first difference"


def test_the_bundled_models_logits_are_within_the_bound(pair: tuple[LLM, LLM]) -> None:
    tokenizer = Tokenizer.from_dir(bundled.target())
    tokens = list(tokenizer.encode("In the beginning God created the heaven and the earth. " * 6))
    plain, narrow = (
        Forced(llm.engine, CpuBackend(llm.engine, Path(llm.engine_dir))).run([tokens], [1])[0] for llm in pair
    )
    error = (narrow - plain).abs().amax(-1) / plain.abs().amax(-1)
    assert 0 < error.max() <= LOGITS
    loss = [torch.nn.functional.cross_entropy(x[:-1], torch.tensor(tokens[1:])).item() for x in (plain, narrow)]
    assert loss[1] == pytest.approx(loss[0], abs=0.02)  # nats a token


def test_another_type_is_another_engine(pair: tuple[LLM, LLM]) -> None:
    plain, narrow = pair
    assert plain.engine_dir != narrow.engine_dir
    with pytest.raises(OptionError, match="keeps KV in fp8_e4m3"):
        LLM(narrow.engine_dir, device="cpu", kv_cache_dtype="float32")
    with pytest.raises(OptionError, match="keeps KV in f32"):
        LLM(plain.engine_dir, device="cpu", kv_cache_dtype="fp8")
    LLM(narrow.engine_dir, device="cpu", kv_cache_dtype="fp8").shutdown()
