"""LLM and ModelRunner on a CPU: text in, text out, streaming, stops, refusals."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock import LLM, SamplingParams
from penstock import llm as module
from penstock.engine import store
from penstock.errors import (
    EngineMismatch,
    ExecutorError,
    OptionError,
    PromptError,
    ResourceError,
    TokenizerError,
    UnsupportedError,
)
from penstock.runtime import ModelRunner
from penstock.runtime.step import CpuBackend

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, device="cpu") as model:
        yield model


def test_greedy_text_is_hugging_faces(llm: LLM, tiny_model: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny_model).eval()
    prompts = ["In the beginning", "A tuple is", "God"]
    for output in llm.generate(prompts, GREEDY):
        ids = torch.tensor([output.prompt_token_ids])
        with torch.no_grad():
            want = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output.outputs[0].token_ids == tuple(want[0, ids.shape[1] :].tolist())
        assert output.outputs[0].text == llm.tokenizer.decode(list(output.outputs[0].token_ids))  # type: ignore[union-attr]
        assert (output.finished, output.outputs[0].finish_reason) == (True, "length")


def test_streaming_gives_the_same_text(llm: LLM) -> None:
    whole = llm.generate("In the beginning", GREEDY)[0].outputs[0].text
    assert "".join(llm.stream("In the beginning", GREEDY)) == whole

    async def collect() -> list[str]:
        return [p.outputs[0].text async for p in llm.generate_async("In the beginning", GREEDY)]

    parts = asyncio.run(collect())
    assert parts[-1] == whole and all(whole.startswith(p) for p in parts) and len(parts) == 12


def test_leaving_a_stream_early_frees_its_blocks(llm: LLM) -> None:
    async def first() -> None:
        async for _ in llm.generate_async(
            "In the beginning", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        ):
            break

    asyncio.run(first())
    llm.generate("God", GREEDY)
    assert llm.stats()["kv_cache_usage"] == 0


def test_a_request_cancelled_while_it_is_submitted_does_not_run_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller has gone before the first token, and nobody else knows its id."""
    plain = llm._loop.submit

    def slow(new: Any) -> None:
        plain(new)
        time.sleep(0.2)  # the caller is cancelled in here

    async def cancelled() -> int:
        params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
        parts = llm.generate_async({"prompt_token_ids": [5]}, params)
        task = asyncio.ensure_future(anext(parts))
        await asyncio.sleep(0.05)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return int(llm.stats()["requests_running"])

    monkeypatch.setattr(llm._loop, "submit", slow)
    assert asyncio.run(cancelled()) == 0


def test_stats_count_the_hosts_time(llm: LLM) -> None:
    before = llm.stats()
    llm.generate(["God", "In"], GREEDY)
    after = llm.stats()
    assert after["host_steps"] == after["steps"] > before["steps"] and after["host_seconds"] > before["host_seconds"]
    assert after["host_us_per_step"] == pytest.approx(1e6 * after["host_seconds"] / after["host_steps"])


def test_a_stop_string_ends_the_text(llm: LLM) -> None:
    whole = llm.generate("In the beginning", GREEDY)[0].outputs[0].text
    stop = whole[4:7]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    output = llm.generate("In the beginning", params)[0].outputs[0]
    assert output.text == whole[: whole.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_a_stop_token_ends_the_text(llm: LLM) -> None:
    ids = llm.generate("In the beginning", GREEDY)[0].outputs[0].token_ids
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(ids[3],))
    output = llm.generate("In the beginning", params)[0].outputs[0]
    assert output.token_ids == ids[: ids.index(ids[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[3])


def test_seeds_repeat_and_differ(llm: LLM) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
        return llm.generate("In the beginning", params)[0].outputs[0].token_ids

    assert draw(1) == draw(1)
    assert len({draw(s) for s in range(4)}) == 4


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [5, 300]}, "token id 300 at position 1 is outside the vocabulary of 300"),
        ({"prompt_token_ids": [-1]}, "token id -1"),
        ({"prompt_token_ids": [5] * 256}, "has 256 tokens, the limit is 255"),
        ({"tokens": [5]}, "is neither text nor"),
    ],
)
def test_bad_prompts_are_named_and_nothing_runs(llm: LLM, prompt: Any, named: str) -> None:
    steps = llm.stats()["steps"]
    with pytest.raises(PromptError, match=named):
        llm.generate([{"prompt_token_ids": [5]}, prompt], GREEDY)
    assert llm.stats()["steps"] == steps
    assert llm.stats()["requests_running"] == llm.stats()["requests_waiting"] == 0


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"quantization": "fp8"}, UnsupportedError),
        ({"tensor_parallel_size": 2}, UnsupportedError),
        ({"kv_cache_dtype": "fp8"}, OptionError),  # the engine keeps float32
        ({"kv_cache_dtype": "int8"}, OptionError),
        ({"pipeline_parallel_size": 2}, UnsupportedError),
        ({"lora_paths": ["a"]}, UnsupportedError),
        ({"max_loras": 1}, UnsupportedError),
        ({"max_lora_rank": 8}, UnsupportedError),
        ({"speculative": "draft"}, UnsupportedError),
        ({"gpu_memory": 0.5}, OptionError),
        ({"gpu_memory_utilization": 1.5}, OptionError),
    ],
)
def test_arguments_are_refused_by_name(tiny_engine: Path, argument: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(argument))):
        LLM(tiny_engine, **argument)


def test_unbuilt_arguments_are_in_the_signature_with_their_neutral_values(tiny_engine: Path) -> None:
    given = inspect.signature(LLM.__init__).parameters
    names = {
        "quantization", "tensor_parallel_size", "pipeline_parallel_size", "lora_paths", "max_loras",
        "max_lora_rank", "speculative",
    }  # fmt: skip
    assert names <= given.keys()
    LLM(tiny_engine, device="cpu", **{name: given[name].default for name in names}).shutdown()


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"lora_request": [None]}, UnsupportedError),
        ({"lora_indices": [0]}, UnsupportedError),
        ({"quantization": None}, OptionError),
        ({"temperature": 0}, OptionError),
    ],
)
def test_generate_takes_no_arguments_of_the_constructor(
    llm: LLM, argument: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(argument))):
        llm.generate("God", GREEDY, **argument)
    llm.generate("God", GREEDY, lora_request=None, lora_indices=None)


def test_lower_limits_hold_on_an_engine(tiny_engine: Path, tmp_path: Path) -> None:
    with LLM(
        tiny_engine, device="cpu", cache_dir=tmp_path, max_seq_len=20, max_batch_size=2, max_num_tokens=8
    ) as model:
        limits = model._loop.executor.scheduler.limits
        assert (limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len) == (2, 8, 20)
        with pytest.raises(PromptError, match="the limit is 19"):
            model.generate({"prompt_token_ids": [5] * 20}, GREEDY)
        output = model.generate({"prompt_token_ids": [5] * 15}, GREEDY)[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (5, "length")
        model.refit(store.load(tiny_engine).source["model"])
        assert model._loop.executor.scheduler.limits.max_seq_len == 20, "and after a refit too"


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"max_batch_size": 5}, r"max_batch_size=5 exceeds the 4"),
        ({"max_num_tokens": 25}, r"max_num_tokens=25 exceeds the 24"),
        ({"max_seq_len": 257}, r"max_seq_len=257 exceeds the 256"),
        ({"max_num_tokens": 2}, r"max_num_tokens=2 is less than max_batch_size=4"),
        ({"dtype": "float16"}, r"dtype='float16', but the engine in .* computes in f32"),
        ({"weights": "random"}, r"weights='random', but the engine"),
        ({"tactics": {"linear": "reference"}}, r"tactics=.*, but the engine"),
        ({"revision": "main"}, r"revision='main' is for hub names"),
    ],
)
def test_what_an_engine_cannot_change_is_refused(tiny_engine: Path, argument: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        LLM(tiny_engine, device="cpu", **argument)


def test_what_an_engine_has_may_be_repeated(tiny_model: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "device": "cpu", "cache_dir": tmp_path, "dtype": "float32", "weights": "random",
        "tactics": {"linear": "reference"}, "max_batch_size": 4,
    }  # fmt: skip
    with LLM(tiny_model, **given) as built, LLM(built.engine_dir, **given) as opened:
        assert opened.engine_dir == built.engine_dir


def test_an_engine_of_other_software_is_selected_anew(tiny_engine: Path, tmp_path: Path) -> None:
    with store.writing(tmp_path / "old") as part:
        shutil.copytree(tiny_engine, part, dirs_exist_ok=True)
        store.save(replace(store.load(tiny_engine), software={"penstock": "0"}), part)
        (part / store.FILES).unlink()
    with LLM(tmp_path / "old", device="cpu", cache_dir=tmp_path, tactics={"linear": "reference"}) as model:
        assert model.engine_dir.parent == tmp_path / "engines"
        assert len(model.generate("God", GREEDY)[0].outputs[0].token_ids) == 12
    with pytest.raises(EngineMismatch, match="penstock 0"):
        ModelRunner.from_dir(tmp_path / "old")


def test_a_bad_tokenizer_costs_no_build(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError):
        LLM(model, device="cpu", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_outputs_say_which_defaults_were_taken(llm: LLM) -> None:
    notes = llm.generate("God", SamplingParams(temperature=0, ignore_eos=True))[0].notes
    assert set(notes) == {"top_p=1.0 (default)", "top_k=0 (default)", "max_tokens=16 (default)"}
    assert llm.generate("God", SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=1))[0].notes == ()


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    """Other weights of the same spec, with a tokenizer that knows no merges."""
    from tests.cpu import tiny

    model = tiny.write(tmp_path / "other", seed=1)
    words = json.loads((model / "tokenizer.json").read_text())
    words["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(words))
    return model


def test_refit_leaves_the_engine_and_brings_the_tokenizer(tiny_engine: Path, other_model: Path, tmp_path: Path) -> None:
    before = store.load(tiny_engine).source
    with LLM(tiny_engine, device="cpu", cache_dir=tmp_path / "cache") as model:
        ids = {"prompt_token_ids": [5, 6, 7]}
        first, text = model.generate(ids, GREEDY)[0].outputs[0].token_ids, model.generate("God", GREEDY)[0]
        model.refit(other_model)
        assert model.generate(ids, GREEDY)[0].outputs[0].token_ids != first
        assert len(model.generate("In the beginning", GREEDY)[0].prompt_token_ids) == len("In the beginning")
        assert model.engine_dir.parent == tmp_path / "cache" / "engines"
    assert store.load(tiny_engine).source == before
    with LLM(tiny_engine, device="cpu") as again:
        assert again.generate("God", GREEDY)[0].outputs == text.outputs
    with LLM(other_model, device="cpu", cache_dir=tmp_path / "built") as built:
        assert built.generate(ids, GREEDY)[0].outputs[0].token_ids != first


def test_a_refit_that_does_not_open_leaves_the_old_model(
    tiny_engine: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(tiny_engine, device="cpu", cache_dir=tmp_path / "cache") as model:
        want = model.generate("God", GREEDY)[0].outputs
        plain, opened = module.open_loop, []

        def full(*arguments: Any, **named: Any) -> Any:
            opened.append(arguments[0])
            if len(opened) == 1:
                raise ResourceError("no room")
            return plain(*arguments, **named)

        monkeypatch.setattr(module, "open_loop", full)
        with pytest.raises(ResourceError, match="no room"):
            model.refit(other_model)
        assert model.engine_dir == tiny_engine and model.generate("God", GREEDY)[0].outputs == want


def test_a_failed_step_ends_its_requests_and_no_others(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = CpuBackend.launch, []

    def faulty(self: CpuBackend, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a cosmic ray")
        return plain(self, *rest)

    with LLM(tiny_engine, device="cpu") as model:
        model.generate("God", GREEDY)
        monkeypatch.setattr(CpuBackend, "launch", faulty)
        with pytest.raises(ExecutorError, match="a cosmic ray"):
            model.generate("In the beginning", GREEDY)
        assert len(model.generate("God", GREEDY)[0].outputs[0].token_ids) == 12
        assert model.stats()["kv_cache_usage"] == 0


def test_after_shutdown_calls_say_so(tiny_engine: Path) -> None:
    model = LLM(tiny_engine, device="cpu")
    model.shutdown()
    with pytest.raises(ExecutorError, match="shut down"):
        model.generate("In", GREEDY)


def test_an_engine_directory_stands_alone(llm: LLM, tmp_path: Path) -> None:
    saved = llm.save_engine(tmp_path / "engine")
    with ModelRunner.from_dir(saved) as runner:
        want = [o.outputs[0].text for o in llm.generate(["In the", "A"], GREEDY)]
        assert runner.generate(["In the", "A"], sampling_params=GREEDY) == want


def test_a_runner_takes_one_length(tiny_engine: Path) -> None:
    with ModelRunner.from_dir(tiny_engine) as runner:
        assert len(runner.run(["God"], GREEDY)[0].outputs[0].token_ids) == 12
        with pytest.raises(OptionError, match=r"max_new_tokens=5 was given beside sampling_params"):
            runner.generate(["God"], 5, GREEDY)


def test_a_runner_runs_all_or_none(tiny_engine: Path) -> None:
    with ModelRunner.from_dir(tiny_engine) as runner:
        with pytest.raises(PromptError, match="empty"):
            runner.run(["God", ""], GREEDY)
        executor = runner._loop.executor
        assert executor.stats.steps == executor.scheduler.num_waiting == executor.scheduler.num_running == 0
