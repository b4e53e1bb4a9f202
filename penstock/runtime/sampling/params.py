"""How to sample one request: every parameter, its range, and which go together."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from penstock.errors import SamplingError
from penstock.grammar import GuidedDecoding
from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.runtime.schedule.groups import MOST_BEAMS

MOST_TEXTS: Final = 1024  # of one prompt

# Field -> (lowest, highest); None: no limit on that side.
_INTEGERS: Final[dict[str, tuple[int, int | None]]] = {
    "n": (1, MOST_TEXTS),
    "best_of": (1, MOST_TEXTS),
    "beam_width": (1, MOST_BEAMS),
    "max_tokens": (1, None),
    "min_tokens": (0, 2**30),
    "top_k": (-1, 2**31 - 1),  # the device keeps it in 32 bits
    "no_repeat_ngram_size": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MOST_LOGPROBS),
    "prompt_logprobs": (0, MOST_LOGPROBS),
}
_REALS: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "length_penalty": (-10.0, 10.0),  # so that no power of a length leaves what a float holds
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_ABOVE_LOW: Final = frozenset({"top_p"})
_FLAGS: Final = ("use_beam_search", "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens")
_LISTS: Final = ("stop", "stop_token_ids", "bad_words", "logits_processors")
# Below these, logits / temperature and sums of probabilities leave what float32 can tell apart.
_LEAST_TEMPERATURE: Final = 1e-5
_LEAST_TOP_P: Final = 1e-6
_MOST_BIAS: Final = 100.0
# What has no meaning beside a search for the likeliest text, and what has none without one.
_NOT_WITH_BEAMS: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "best_of", "logprobs",
                          "prompt_logprobs", "logits_processors", "stop", "guided_decoding")  # fmt: skip
_ONLY_WITH_BEAMS: Final = ("beam_width", "length_penalty", "early_stopping")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one request. Names and meanings as vLLM's and OpenAI's; bad values raise SamplingError.

    None for temperature, top_p, top_k, min_p, repetition_penalty, no_repeat_ngram_size, max_tokens: as the model's
    generation_config says, otherwise 1.0, 1.0, off, off, off, off and 16 (see `Resolver`). `temperature=0` is greedy;
    `top_k` 0 or -1 is off. Lists
    are taken and kept as tuples, a single stop string as a tuple.

    n completions, the likeliest of best_of where that is more. use_beam_search: the n best of beam_width (default: n)
    by log-probability / length ** length_penalty; early_stopping False, True or "never", as Hugging Face's.
    presence_penalty and frequency_penalty count what was generated; repetition_penalty and no_repeat_ngram_size the
    prompt too. min_tokens: before so many, no token ends the text. bad_words: texts that may not be written.
    logit_bias: {token id: -100 to 100}. logprobs, prompt_logprobs: for each token its own log-probability and those
    of so many likeliest ones, of the model's own distribution. logits_processors: callables (tokens generated so far,
    logits f32[V] on the host) -> logits, before all that is above, log-probabilities too; the request leaves the fast
    path. guided_decoding: what the text is held to, before penalties, biases and bans; log-probabilities stay the
    model's own. It alone says when the text may end, so min_tokens and ignore_eos do not go with it; a limit, a stop
    string or stop token may cut the text short.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
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
    guided_decoding: GuidedDecoding | None = None
    logits_processors: tuple[Callable[..., Any], ...] = ()

    def __post_init__(self) -> None:
        for name in _LISTS:
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        self._check_temperature()
        self._check_stops()
        self._check_lists()
        self._check_count()
        self._check_guided()

    def filled(self, values: Mapping[str, Any]) -> SamplingParams:
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

    def _check_lists(self) -> None:
        for word in self.bad_words:
            if not isinstance(word, str) or not word:
                raise SamplingError(f"bad_words={self.bad_words!r} holds {word!r}; give texts of 1 character or more")
        for processor in self.logits_processors:
            if not callable(processor):
                raise SamplingError(f"logits_processors holds {processor!r}, which cannot be called; give functions")
        if self.logit_bias is None:
            return
        given: object = self.logit_bias
        if not isinstance(given, Mapping):
            kind = type(self.logit_bias).__name__
            raise SamplingError(f"logit_bias={self.logit_bias!r} is a {kind}; give {{token id: bias}}")
        object.__setattr__(self, "logit_bias", dict(given))  # the caller may change theirs
        for token, bias in given.items():
            if not (_is_integer(token, 0) and _is_real(bias, -_MOST_BIAS, _MOST_BIAS)):
                raise SamplingError(
                    f"logit_bias holds {token!r}: {bias!r}; give token ids from 0, and biases from {-_MOST_BIAS:g} to "
                    f"{_MOST_BIAS:g}"
                )

    def _check_count(self) -> None:
        if self.best_of is not None and self.best_of < self.n:
            raise SamplingError(f"best_of={self.best_of} is below n={self.n}; the n best are chosen of best_of")
        given: object = self.early_stopping
        if not (isinstance(given, bool) or (isinstance(given, str) and given == "never")):
            raise SamplingError(f"early_stopping={self.early_stopping!r} is unknown; give True, False or 'never'")
        defaults = {each.name: each.default for each in fields(SamplingParams)}
        wrong = _NOT_WITH_BEAMS if self.use_beam_search else _ONLY_WITH_BEAMS
        for name in wrong:
            value = getattr(self, name)
            if value != defaults[name] and not (name == "temperature" and value == 0):
                with_, remedy = ("with", "out") if self.use_beam_search else ("without", "out, or set use_beam_search")
                raise SamplingError(f"{name}={value!r} has no meaning {with_} use_beam_search; leave it {remedy}")
        if self.use_beam_search and self.width > MOST_BEAMS:
            raise SamplingError(f"n={self.n} is too many beams; there may be {MOST_BEAMS}")
        if self.beam_width is not None and self.beam_width < self.n:
            raise SamplingError(f"beam_width={self.beam_width} is below n={self.n}; the n best are chosen of the beams")

    def _check_guided(self) -> None:
        if self.guided_decoding is None:
            return
        given: object = self.guided_decoding
        if not isinstance(given, GuidedDecoding):
            raise SamplingError(f"guided_decoding={str(given)[:60]!r} is a {type(given).__name__}; give GuidedDecoding")
        self.refuse_ends()

    def refuse_ends(self) -> None:
        """Raise SamplingError where the parameters would forbid or ignore the end of a text held to a grammar."""
        for name in ("use_beam_search", "min_tokens", "ignore_eos"):
            if getattr(self, name):
                raise SamplingError(f"{name}={getattr(self, name)!r} does not go with guided_decoding; leave one out")

    @property
    def width(self) -> int:
        """Beams, or texts sampled to choose from."""
        return self.beam_width or self.best_of or self.n

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
