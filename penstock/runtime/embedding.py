"""The vector of a prompt: the row of results behind its last token, of an engine without a head."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.engine.manifest import Engine
from penstock.errors import OptionError, SamplingError
from penstock.runtime.sampling.params import SamplingParams

Vector = npt.NDArray[np.float32]


class Pooled:
    """Takes the row as logits processors get theirs: the request ends with its one row, whose token means nothing."""

    def __init__(self, engine: Engine) -> None:
        self._normalizes = bool(engine.tokens.get("normalize", True))
        self._row: Vector | None = None

    def __call__(self, tokens: list[int], row: Any) -> Any:
        self._row = row.numpy().copy()
        if not np.isfinite(self._row).all():
            raise SamplingError("the model gave numbers that are not finite; use another dtype")
        return row

    @cached_property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, logits_processors=(self,)
        )

    @property
    def vector(self) -> Vector | None:
        """f32[E], of length 1 where the model normalises; None where the request ended before."""
        return self._row if self._row is None or not self._normalizes else normalized(self._row)


def normalized(vector: Vector) -> Vector:
    """Of length 1, computed in float64; one of zeros stays so."""
    length = float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))
    return (vector / max(length, 1e-12)).astype(np.float32)


def check_task(engine: Engine, params: SamplingParams) -> None:
    """Raises OptionError for a request that the engine was not built for."""
    embeds = any(isinstance(each, Pooled) for each in params.logits_processors)
    if embeds == engine.model_spec.head:
        asked, has = ("a vector", "generates text") if embeds else ("text", "gives vectors")
        raise OptionError(
            f"{asked} was asked for, but the engine {has}; open the model with task="
            f"{'embed' if embeds else 'generate'!r}"
        )
