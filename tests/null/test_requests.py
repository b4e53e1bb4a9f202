"""The records of a request: ranges, refusals of what is not built, the model's own defaults."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from penstock.errors import InputError, PenstockError, SamplingError, UnsupportedError
from penstock.runtime.requests import (
    CompletionOutput,
    LoRARequest,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    resolve,
)
from penstock.unsupported import UNSUPPORTED, refuse, require_default

SUPPORTED: dict[str, Any] = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.9,
    "seed": -3,
    "stop": ("x",),
    "stop_token_ids": (1, 2),
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "detokenize": False,
    "skip_special_tokens": False,
}
NOT_BUILT: dict[str, Any] = {
    "n": 2,
    "best_of": 2,
    "use_beam_search": True,
    "beam_width": 4,
    "length_penalty": 0.5,
    "early_stopping": True,
    "min_tokens": 1,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 3,
    "bad_words": ("a",),
    "logit_bias": {1: 2.0},
    "logprobs": 1,
    "prompt_logprobs": 0,
    "guided_decoding": "json",
    "logits_processors": (print,),
}
BAD: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", True),
    ("max_tokens", 2.0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("temperature", 1e-6),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("seed", 2**63),
    ("seed", "7"),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", 3),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("n", 0),
    ("n", None),
    ("min_p", 1.5),
    ("presence_penalty", 2.5),
    ("repetition_penalty", 0.0),
]


def test_every_field_is_either_supported_or_in_the_table() -> None:
    names = {each.name for each in fields(SamplingParams)}
    assert names == SUPPORTED.keys() | NOT_BUILT.keys()
    assert names & UNSUPPORTED.keys() == NOT_BUILT.keys()


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    assert getattr(SamplingParams(**{name: SUPPORTED[name]}), name) == SUPPORTED[name]


@pytest.mark.parametrize("name", NOT_BUILT)
def test_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{name}=.* is not built yet: "):
        SamplingParams(**{name: NOT_BUILT[name]})


def test_defaults_written_out_are_accepted() -> None:
    params = SamplingParams(n=1, repetition_penalty=1.0, bad_words=[], logprobs=None)  # type: ignore[arg-type]
    assert params == SamplingParams()


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_field_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name}=") and isinstance(caught.value, InputError)


def test_stop_needs_text() -> None:
    with pytest.raises(SamplingError, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_kept_as_tuples_and_frozen() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[5])  # type: ignore[arg-type]
    assert params.stop_strings == params.stop == ("END",) and params.stop_token_ids == (5,)
    assert params == SamplingParams(stop=("END",), stop_token_ids=(5,)) and hash(params) == hash(params)
    with pytest.raises(FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_resolve_falls_back_to_openai() -> None:
    params, notes = resolve(SamplingParams(seed=1), {})
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert params.seed == 1 and not params.greedy
    assert notes == ("temperature=1.0 (default)", "top_p=1.0 (default)", "top_k=0 (default)", "max_tokens=16 (default)")


def test_resolve_listens_to_the_model_and_the_caller_wins() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 100, "do_sample": True, "eos_token_id": 2}
    params, notes = resolve(SamplingParams(top_p=0.5), config)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.5, 100)
    assert "temperature=0.6 (generation_config)" in notes and not any(note.startswith("top_p") for note in notes)
    assert SamplingParams(temperature=0).greedy
    assert resolve(SamplingParams(), {"do_sample": False, "temperature": 0.7})[0].greedy
    with pytest.raises(SamplingError, match="top_p=7"):
        resolve(SamplingParams(), {"top_p": 7})


def test_resolve_says_what_it_does_not_apply() -> None:
    _, notes = resolve(SamplingParams(), {"repetition_penalty": 1.05, "min_p": None, "length_penalty": 1.0})
    assert notes[-1] == "repetition_penalty=1.05 of generation_config is not applied: not built yet"
    assert len(notes) == 5


def test_the_table() -> None:
    with pytest.raises(UnsupportedError, match=r"^penstock serve is not built yet: "):
        refuse("penstock serve")
    with pytest.raises(UnsupportedError, match=r"^tensor_parallel_size=2 is not built yet: "):
        require_default("tensor_parallel_size", 2, 1)
    require_default("tensor_parallel_size", 1, 1)
    require_default("temperature", 0.3, None)
    assert issubclass(UnsupportedError, PenstockError)


def test_outputs() -> None:
    metrics = RequestMetrics(arrival=10.0, first_token=10.5, finished=12.0)
    assert (metrics.time_to_first_token, metrics.latency) == (0.5, 2.0)
    assert RequestMetrics(1.0).time_to_first_token is None and RequestMetrics(1.0).latency is None
    output = RequestOutput("r", None, (1, 2), (CompletionOutput(0, "hi", (3,), "stop", 3),), True, metrics)
    assert output.outputs[0].finish_reason == "stop" and LoRARequest("a").path is None
