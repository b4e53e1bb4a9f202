"""Torch on first use: graph work needs types alone, so building and printing graphs never pays torch's import."""

from __future__ import annotations

import importlib
from typing import Any


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)  # found without us from now on
        return value


torch: Any = _Lazy("torch")
