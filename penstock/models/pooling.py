"""Models that give a vector of a text: what the files of sentence-transformers beside a checkpoint say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.models.directory import ModelDirectory
from penstock.text.files import parse_json

MODULES = "modules.json"
_KINDS = {"Transformer", "Pooling", "Normalize"}


def open_for(path: Path, task: str) -> tuple[ModelDirectory, Mapping[str, Any]]:
    """A model directory for a task, "auto": to embed where it is a model of sentence-transformers; and what an engine
    has to know of it, {"normalize": whether vectors get length 1}, where it embeds.

    Raises what `ModelDirectory.open` does, ConfigError for a way to pool that is not implemented, UnsupportedError.
    """
    opened, modules = ModelDirectory.open(path), path / MODULES
    if task == "generate" or (task == "auto" and not modules.is_file()):
        return opened, {}
    return opened.headless(), {"normalize": _normalizes(modules) if modules.is_file() else True}


def _normalizes(modules: Path) -> bool:
    """Whether the last module does, behind a transformer and a pooling of the last token."""
    found = _json(modules)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ConfigError(f"{modules} is no list of modules; fetch the file again, or set task")
    kinds = [str(each.get("type", "")).rpartition(".")[2] for each in found]
    if unknown := sorted(set(kinds) - _KINDS):
        raise ConfigError(f"{modules}: a module {unknown[0]!r} is not implemented; known are {', '.join(_KINDS)}")
    for kind, each in zip(kinds, found, strict=True):
        if kind == "Pooling":
            _check_pooling(modules.parent / str(each.get("path", "")) / "config.json")
    return "Normalize" in kinds


def _check_pooling(path: Path) -> None:
    config = _json(path)
    modes = {name for name, value in config.items() if name.startswith("pooling_mode_") and value is True}
    modes |= {f"pooling_mode_{config['pooling_mode']}"} if "pooling_mode" in config else set()
    if other := sorted(modes - {"pooling_mode_lasttoken"}) or ([] if modes else ["no mode"]):
        raise ConfigError(f"{path}: {other[0]} is not implemented, the last token's row alone is; use another model")


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}); fetch the file again") from None
