"""What goes into a request and what comes out: plain records, no tensors, no clock."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Final

from penstock.errors import SamplingError
from penstock.runtime.schedule.request import FinishReason
from penstock.unsupported import UNSUPPORTED, require_default

# Field -> (lowest, highest); None: no limit on that side.
_INTEGERS: Final[dict[str, tuple[int, int | None]]] = {
    "n": (1, None),
    "best_of": (1, None),
    "beam_width": (1, None),
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "top_k": (-1, 2**31 - 1),  # the device keeps it in 32 bits
    "no_repeat_ngram_size": (0, None),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, None),
    "prompt_logprobs": (0, None),
}
_REALS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "length_penalty": (-math.inf, math.inf),
    "repetition_penalty": (0.0, math.inf),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_ABOVE_LOW: Final = frozenset({"top_p", "repetition_penalty"})
_FLAGS: Final = (
    "use_beam_search",
    "early_stopping",
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
)
# Below these, logits / temperature and sums of probabilities leave what float32 can tell apart.
_LEAST_TEMPERATURE: Final = 1e-5
_LEAST_TOP_P: Final = 1e-6

# Field -> (its key in generation_config.json, what it is where that says nothing).
_MODEL_DEFAULTS: Final[dict[str, tuple[str, float | int]]] = {
    "temperature": ("temperature", 1.0),
    "top_p": ("top_p", 1.0),
    "top_k": ("top_k", 0),
    "max_tokens": ("max_new_tokens", 16),
}


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Names and meanings as vLLM's and OpenAI's; bad values raise SamplingError.

    None for temperature, top_p, top_k, max_tokens: as the model's generation_config says, otherwise 1.0, 1.0, off and
    16 (see `resolve`). `temperature=0` is greedy; `top_k` 0 or -1 is off. A name that is not built yet raises
    UnsupportedError at any value but its default. Lists are taken and kept as tuples, a single stop string as a tuple.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    guided_decoding: object | None = None
    logits_processors: tuple[Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        self._check_temperature()
        self._check_stops()
        for name, default in _unbuilt():
            require_default(name, getattr(self, name), default)

    def _filled(self, values: Mapping[str, Any]) -> SamplingParams:
        """A copy with other values, of which only those are checked anew: this is on the way to the first token."""
        for name, value in values.items():
            _CHECKS[name](name, value)
        full = object.__new__(SamplingParams)
        vars(full).update(vars(self), **values)
        full._check_temperature()
        full._check_stops()
        return full

    def _check_temperature(self) -> None:
        value, least = self.temperature, _LEAST_TEMPERATURE
        if value is not None and 0 < value < least:
            raise SamplingError(f"temperature={value!r} is too small; give 0 for greedy, or at least {least}")
        if self.top_p is not None and self.top_p < _LEAST_TOP_P:
            raise SamplingError(
                f"top_p={self.top_p!r} is too small; give temperature=0 for greedy, or at least {_LEAST_TOP_P}"
            )

    def _check_stops(self) -> None:
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SamplingError(f"stop={self.stop!r} holds {text!r}; every stop string needs 1 character or more")
        if self.stop and not self.detokenize:
            raise SamplingError(f"stop={self.stop!r} needs text; leave detokenize at True or use stop_token_ids")
        for token in self.stop_token_ids:
            if not _is_integer(token, 0):
                raise SamplingError(f"stop_token_ids={self.stop_token_ids!r} holds {token!r}; give integers from 0")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens={self.min_tokens} is over max_tokens={self.max_tokens}; lower it")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is kept: a tuple."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken always."""
        return self.temperature == 0


def _is_integer(value: object, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)


def _is_real(value: object, low: float, high: float) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    largest = sys.float_info.max  # so infinities and integers that no float holds are out; nan compares false
    return max(low, -largest) <= value <= min(high, largest)


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) and name in ("stop", "bad_words"):
        return (value,)
    if not isinstance(value, (tuple, list)):
        raise SamplingError(f"{name}={value!r} is a {type(value).__name__}; give a list or a tuple")
    return tuple(value)


def _check_integer(name: str, value: object) -> None:
    low, high = _INTEGERS[name]
    if not (_may_be_none(name, value) or _is_integer(value, low, high)):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SamplingError(f"{name}={value!r} is outside its range; give an integer {allowed}")


def _check_real(name: str, value: object) -> None:
    low, high = _REALS[name]
    above = name in _ABOVE_LOW
    if not (_may_be_none(name, value) or (_is_real(value, low, high) and not (above and value == low))):
        allowed = (f"above {low}" if above else f"from {low}") + ("" if high == math.inf else f" to {high}")
        raise SamplingError(f"{name}={value!r} is outside its range; give a finite number {allowed}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SamplingError(f"{name}={value!r} is a {type(value).__name__}; give True or False")


_CHECKS: Final[dict[str, Callable[[str, object], None]]] = {
    **dict.fromkeys(_INTEGERS, _check_integer),
    **dict.fromkeys(_REALS, _check_real),
    **dict.fromkeys(_FLAGS, _check_flag),
}


def _may_be_none(name: str, value: object) -> bool:
    """Exactly the fields whose default is None take None."""
    return value is None and getattr(SamplingParams, name) is None


class Resolver:
    """Fills what sampling parameters leave open from a model's generation_config.json, and says what it took.

    `do_sample: false` there means temperature 0. A value there that is not built yet is not applied; a line says so.
    What that file says is read once; the parameters of the last request are kept, for a batch has them in common.
    """

    def __init__(self, generation_config: Mapping[str, Any]) -> None:
        self._open: dict[str, tuple[Any, str]] = {}  # field -> (what is taken, the line that says so)
        for name, (key, fallback) in _MODEL_DEFAULTS.items():
            spoken = _spoken(name, key, generation_config)
            value, origin = (fallback, "default") if spoken is None else (spoken, "generation_config")
            self._open[name] = value, f"{name}={value} ({origin})"
        self._unapplied = tuple(
            f"{name}={value} of generation_config is not applied: not built yet"
            for name, default in _unbuilt()
            if (value := generation_config.get(name)) is not None and value != default
        )
        self._last: tuple[SamplingParams, tuple[SamplingParams, tuple[str, ...]]] | None = None

    def resolve(self, params: SamplingParams) -> tuple[SamplingParams, tuple[str, ...]]:
        """Parameters without a gap, and a line for each that was filled. Any thread may call it.

        Raises SamplingError where the model's own value is out of range.
        """
        last = self._last
        if last is not None and last[0] is params:
            return last[1]
        taken = {name: found for name, found in self._open.items() if getattr(params, name) is None}
        full = params._filled({name: value for name, (value, _) in taken.items()}) if taken else params
        resolved = full, (*(line for _, line in taken.values()), *self._unapplied)
        self._last = params, resolved
        return resolved


def resolve(params: SamplingParams, generation_config: Mapping[str, Any]) -> tuple[SamplingParams, tuple[str, ...]]:
    """As `Resolver`, for once."""
    return Resolver(generation_config).resolve(params)


@cache
def _unbuilt() -> tuple[tuple[str, Any], ...]:
    """Fields that take only their default yet, with it."""
    return tuple((each.name, each.default) for each in fields(SamplingParams) if each.name in UNSUPPORTED)


def _spoken(name: str, key: str, generation_config: Mapping[str, Any]) -> Any:
    if name == "temperature" and generation_config.get("do_sample") is False:
        return 0.0
    return generation_config.get(key)


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by the name it was loaded under; `path` loads it first if it is not loaded."""

    name: str
    path: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds on one monotonic clock; None: not yet. Filled by the executor.

    `admitted`: when its first tokens were launched. `reused_tokens`: of its prompt, whose KV was found.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    admitted: float | None = None
    reused_tokens: int = 0
    preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds."""
        return _between(self.arrival, self.first_token)

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to admission."""
        return _between(self.arrival, self.admitted)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from admission to the first token."""
        return _between(self.admitted, self.first_token)

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the end."""
        return _between(self.first_token, self.finished)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival, self.finished)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. `stop_reason` is the stop string or stop token id that ended it; None for the model's own end."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[Mapping[int, float], ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What a request has given so far; `prompt` is None where token ids came in.

    `notes`: the sampling parameters that were left open, what was taken for each, and from where; a line each.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    notes: tuple[str, ...] = ()
