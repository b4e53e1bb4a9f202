"""The records of a request: ranges, refusals of what is not built, the model's own defaults."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from penstock.errors import InputError, PenstockError, SamplingError, UnsupportedError
from penstock.grammar import GuidedDecoding
from penstock.runtime.requests import (
    CompletionOutput,
    LoRARequest,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from penstock.runtime.sampling.resolve import Resolver
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
    "n": 2,
    "best_of": 2,
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
    "logits_processors": (print,),
    "guided_decoding": GuidedDecoding(regex="a+"),
    "use_beam_search": True,
}
BEAMS: dict[str, Any] = {"beam_width": 4, "length_penalty": 0.5, "early_stopping": "never"}
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
    ("repetition_penalty", float("inf")),
    ("logprobs", 33),
    ("prompt_logprobs", -1),
    ("best_of", 0),
    ("n", 1025),
    ("early_stopping", 1),
    ("min_tokens", -1),
    ("bad_words", ["a", ""]),
    ("bad_words", [3]),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", [(1, 1.0)]),
    ("logits_processors", [7]),
    ("guided_decoding", "a+"),
    ("beam_width", 2),
    ("length_penalty", 2.0),
    ("early_stopping", "sometimes"),
]


def test_every_field_is_either_supported_or_in_the_table() -> None:
    names = {each.name for each in fields(SamplingParams)}
    assert names == SUPPORTED.keys() | BEAMS.keys()
    assert not names & UNSUPPORTED.keys()


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    assert getattr(SamplingParams(**{name: SUPPORTED[name]}), name) == SUPPORTED[name]


def test_defaults_written_out_are_accepted() -> None:
    params = SamplingParams(n=1, presence_penalty=0.0, bad_words=[], logprobs=None)  # type: ignore[arg-type]
    assert params == SamplingParams()


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_field_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith((f"{name}=", f"{name} holds ")) and isinstance(caught.value, InputError)


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
    params, notes = Resolver({}).resolve(SamplingParams(seed=1))
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert params.seed == 1 and not params.greedy
    assert notes == ("temperature=1.0 (default)", "top_p=1.0 (default)", "top_k=0 (default)", "max_tokens=16 (default)")


def test_resolve_listens_to_the_model_and_the_caller_wins() -> None:
    config = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 100, "do_sample": True, "eos_token_id": 2}
    params, notes = Resolver(config).resolve(SamplingParams(top_p=0.5))
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.5, 100)
    assert "temperature=0.6 (generation_config)" in notes and not any(note.startswith("top_p") for note in notes)
    assert SamplingParams(temperature=0).greedy
    assert Resolver({"do_sample": False, "temperature": 0.7}).resolve(SamplingParams())[0].greedy
    with pytest.raises(SamplingError, match="top_p=7"):
        Resolver({"top_p": 7}).resolve(SamplingParams())


def test_resolve_says_what_it_does_not_apply() -> None:
    config = {"repetition_penalty": 1.05, "min_p": None, "length_penalty": 2.0, "num_beams": 1}
    params, notes = Resolver(config).resolve(SamplingParams())
    assert notes[4] == "repetition_penalty=1.05 (generation_config)" and params.repetition_penalty == 1.05
    assert notes[5] == "length_penalty=2.0 of generation_config is not applied: a request asks for it or does without"
    assert len(notes) == 6


def test_a_beam_search_samples_nothing() -> None:
    params, notes = Resolver({"temperature": 0.7}).resolve(SamplingParams(use_beam_search=True, n=2))
    assert params.greedy and params.width == 2 and not any(note.startswith("temperature") for note in notes)
    for name, value in {"temperature": 0.5, "seed": 1, "repetition_penalty": 1.2, "logprobs": 2}.items():
        with pytest.raises(SamplingError, match=f"^{name}=.* no meaning with use_beam_search"):
            SamplingParams(use_beam_search=True, **{name: value})
    for name, value in BEAMS.items():
        assert getattr(SamplingParams(use_beam_search=True, **{name: value}), name) == value
    with pytest.raises(SamplingError, match=r"^n=17 is too many beams"):
        SamplingParams(use_beam_search=True, n=17)


def test_the_table() -> None:
    with pytest.raises(UnsupportedError, match=r"^penstock quantize is not built yet: "):
        refuse("penstock quantize")
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
