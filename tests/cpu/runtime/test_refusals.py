"""Arguments of the wrong kind: a typed error that names the value, and nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.errors import ExecutorError, OptionError, PromptError, SamplingError
from penstock.runtime.open import RunLimits

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 9, 2, 7]}


@pytest.fixture(scope="module")
def llm(tiny_engine: Path) -> Iterator[LLM]:
    with LLM(tiny_engine, device="cpu") as model:
        yield model


@pytest.mark.parametrize("steps", [1.5, 2.0, math.nan, math.inf, 0, -1, True, "3", None])
def test_a_watch_takes_an_integer_of_steps(llm: LLM, steps: Any) -> None:
    with pytest.raises(OptionError, match="give an integer, at least 1"):
        llm.watch(["logits"], steps)
    assert llm._loop.executor.backend.visit is None


@pytest.mark.parametrize("patterns", ["logits", [5], []])
def test_a_watch_takes_a_list_of_names(llm: LLM, patterns: Any) -> None:
    with pytest.raises(OptionError, match=r"give (one|at least one),? like"):
        llm.watch(patterns)


def test_a_second_watch_waits_for_the_first(llm: LLM) -> None:
    first = llm.watch(["logits"], 2)
    with pytest.raises(OptionError, match="another watch has not seen all its steps"):
        llm.watch(["sampled"])
    llm.generate(PROMPT, GREEDY)
    second = llm.watch(["sampled"])
    llm.generate(PROMPT, GREEDY)
    assert (len(first.seen), len(second.seen)) == (2, 1)


def test_a_watch_ends_after_a_step_that_failed(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(tiny_engine, device="cpu", skip_tokenizer_init=True) as llm:
        watch = llm.watch(["logits"])
        visit = llm._loop.executor.backend.visit
        assert visit is not None

        def failing(*seen: Any) -> None:
            visit(*seen)
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(llm._loop.executor.backend, "visit", failing)
        with pytest.raises(ExecutorError):
            llm.generate(PROMPT, GREEDY)
        monkeypatch.setattr(llm._loop.executor.backend, "visit", visit)
        llm.generate(PROMPT, GREEDY)
        assert llm._loop.executor.backend.visit is None and len(watch.seen) == 1


@pytest.mark.parametrize(
    "argument",
    [
        *({"max_gpu_bytes": value} for value in (math.nan, 1.5e9, "1G", True, 0, -5)),
        *({"gpu_memory_utilization": value} for value in ("0.9", None, math.nan, True, 0, -0.1, 1.01)),
    ],
)
def test_memory_is_a_share_or_bytes(tiny_engine: Path, argument: dict[str, Any]) -> None:
    ((name, value),) = argument.items()
    with pytest.raises(OptionError, match=name) as caught:
        LLM(tiny_engine, device="cpu", **argument)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [1.5, "4", True])
def test_limits_of_a_run_are_integers(tiny_engine: Path, value: Any) -> None:
    with pytest.raises(OptionError, match=r"max_batch_size=.* give an integer"):
        RunLimits(max_batch_size=value).within(store.load(tiny_engine).profile)


@pytest.mark.parametrize(
    "prompts", [None, 5, True, *({"prompt_token_ids": ids} for ids in (None, 5, "ab")), [None], [5], [[5, 6]]]
)
def test_prompts_are_text_or_ids(llm: LLM, prompts: Any) -> None:
    with pytest.raises(PromptError):
        llm.generate(prompts, GREEDY)
    if not isinstance(prompts, list):
        with pytest.raises(PromptError):
            llm.stream(prompts, GREEDY)


@pytest.mark.parametrize("params", [5, {"temperature": 0}, [None], [{"temperature": 0}], "greedy"])
def test_sampling_params_are_sampling_params(llm: LLM, params: Any) -> None:
    with pytest.raises((SamplingError, OptionError), match="sampling_params"):
        llm.generate(["God"], params)
