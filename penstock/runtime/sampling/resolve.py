"""What sampling parameters leave open, taken from the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from penstock.runtime.sampling.params import SamplingParams

# Field -> (its key in generation_config.json, what it is where that says nothing, whether that is worth a note).
_MODEL_DEFAULTS: Final[dict[str, tuple[str, float | int, bool]]] = {
    "temperature": ("temperature", 1.0, True),
    "top_p": ("top_p", 1.0, True),
    "top_k": ("top_k", 0, True),
    "max_tokens": ("max_new_tokens", 16, True),
    "min_p": ("min_p", 0.0, False),
    "repetition_penalty": ("repetition_penalty", 1.0, False),
    "no_repeat_ngram_size": ("no_repeat_ngram_size", 0, False),
}
# Keys there that no request asks for by itself, with what asks for nothing.
_UNAPPLIED: Final[dict[str, Any]] = {
    "num_beams": 1, "length_penalty": 1.0, "min_new_tokens": 0, "min_length": 0, "bad_words_ids": None,
    "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None, "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1, "typical_p": 1.0, "penalty_alpha": None, "guidance_scale": None,
}  # fmt: skip

_LIKELIEST: Final = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Resolver:
    """Fills what sampling parameters leave open from a model's generation_config.json, and says what it took.

    `do_sample: false` there means temperature 0; a beam search samples nothing, whatever it says. A line names each
    value there that is not applied.
    What that file says is read once; the parameters of the last request are kept, for a batch has them in common.
    """

    def __init__(self, generation_config: Mapping[str, Any]) -> None:
        self._open: dict[str, tuple[Any, str]] = {}  # field -> (what is taken, the line that says so)
        for name, (key, fallback, noted) in _MODEL_DEFAULTS.items():
            spoken = _spoken(name, key, generation_config)
            value, origin = (fallback, "default") if spoken is None else (spoken, "generation_config")
            self._open[name] = value, f"{name}={value} ({origin})" if noted or spoken is not None else ""
        self._unapplied = tuple(
            f"{name}={value} of generation_config is not applied: a request asks for it or does without"
            for name, default in _UNAPPLIED.items()
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
        if params.use_beam_search:
            taken |= {name: (value, _left_out(name, value, taken)) for name, value in _LIKELIEST.items()}
        full = params.filled({name: value for name, (value, _) in taken.items()}) if taken else params
        resolved = full, (*(line for _, line in taken.values() if line), *self._unapplied)
        self._last = params, resolved
        return resolved


def _left_out(name: str, neutral: float, taken: Mapping[str, tuple[Any, str]]) -> str:
    """A line where the model would have a beam search do what none does: its samples are its own affair."""
    value = taken.get(name, (neutral,))[0]
    penalty = name == "repetition_penalty" and value != neutral
    return f"{name}={value} of generation_config is not applied to a beam search" if penalty else ""


def _spoken(name: str, key: str, generation_config: Mapping[str, Any]) -> Any:
    if name == "temperature" and generation_config.get("do_sample") is False:
        return 0.0
    return generation_config.get(key)
