"""`build --verify`: that an engine found in the cache holds what its checkpoint gives now, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.errors import EngineCorruptError


def verify_weights(target: Path, model: Path, weights: str) -> None:
    """Compute every weight anew and compare. Raises EngineCorruptError naming the first that differs."""
    from penstock.compiler.weights import compute
    from penstock.engine import store
    from penstock.models.directory import ModelDirectory
    from penstock.runtime.weights import load_weights

    engine = store.load(target)
    source = None if weights == "random" else ModelDirectory.open(model).checkpoint()
    held = load_weights(engine, target)
    for name, weight in engine.weights.items():
        if not _same_bytes(compute(weight, source, engine.device.kind), held[name]):
            raise EngineCorruptError(
                f"weight {name} of {target} is not what {model} gives now; remove that directory and build again"
            )


def _same_bytes(left: Any, right: Any) -> bool:
    """Bits are compared: a NaN equals itself, and -0 is not 0."""
    import torch

    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (left, right)))
