"""LLM and ModelRunner on a CPU: text in, text out, streaming, stops, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock import LLM, SamplingParams
from penstock.errors import ExecutorError, OptionError, PromptError, UnsupportedError
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
        ({"lora_paths": ["a"]}, UnsupportedError),
        ({"gpu_memory": 0.5}, OptionError),
        ({"gpu_memory_utilization": 1.5}, OptionError),
    ],
)
def test_arguments_are_refused_by_name(tiny_engine: Path, argument: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(argument))):
        LLM(tiny_engine, **argument)


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
