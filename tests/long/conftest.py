"""The small models and engines of the CPU tests."""

from __future__ import annotations

from tests.cpu.conftest import cache, tiny_engine, tiny_model

__all__ = ["cache", "tiny_engine", "tiny_model"]
