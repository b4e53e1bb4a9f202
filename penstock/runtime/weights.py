"""An engine's weights, memory-mapped from the file and, on a GPU, copied over once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.store import weights_file
from penstock.errors import EngineCorruptError


def load_weights(engine: Engine, directory: Path, device: str) -> Mapping[str, Any]:
    """Weights by name. Raises EngineCorruptError where the file does not hold what the manifest says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / weights_file(), framework="pt", device=device) as file:
            weights = {name: file.get_tensor(name) for name in engine.weights}
    except (SafetensorError, OSError) as error:
        raise EngineCorruptError(
            f"{directory / weights_file()} cannot be read ({error}); build the engine again"
        ) from None
    for name, weight in engine.weights.items():
        if weights[name].nbytes != weight.type.nbytes():
            raise EngineCorruptError(f"weight {name} is no {weight.type}; build the engine again")
    return weights
