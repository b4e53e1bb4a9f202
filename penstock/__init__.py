"""Penstock: a compiler and runtime for large-language-model inference.

Importing the package is instant: every public name is resolved on first use, so that neither torch nor triton is
loaded by a process that only asks for the version.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from penstock.version import __version__

if TYPE_CHECKING:
    from penstock.compiler.compile_graph import compile as compile
    from penstock.errors import PenstockError as PenstockError
    from penstock.llm import LLM as LLM
    from penstock.runtime.requests import LoRARequest as LoRARequest
    from penstock.runtime.requests import RequestOutput as RequestOutput
    from penstock.runtime.requests import SamplingParams as SamplingParams

_HOME = {
    "LLM": "penstock.llm",
    "LoRARequest": "penstock.runtime.requests",
    "PenstockError": "penstock.errors",
    "RequestOutput": "penstock.runtime.requests",
    "SamplingParams": "penstock.runtime.requests",
    "compile": "penstock.compiler.compile_graph",
}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
