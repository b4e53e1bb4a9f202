"""The runtime: an engine becomes tokens. It never imports the compiler."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.runtime.runner import ModelRunner as ModelRunner

__all__ = ["ModelRunner"]


def __getattr__(name: str) -> Any:
    if name != "ModelRunner":
        raise AttributeError(f"module 'penstock.runtime' has no attribute {name!r}")
    return importlib.import_module("penstock.runtime.runner").ModelRunner
