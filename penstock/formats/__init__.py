"""Number formats: what stored numbers mean. One file per format; `parse` finds one by its printed name."""

from __future__ import annotations

from penstock.formats.base import Format, known, parse, register, stored_as
from penstock.formats.floats import BF16, F16, F32, FLOATS
from penstock.formats.fp8 import FP8_E4M3
from penstock.formats.integers import I32, I64, U8

__all__ = [
    "BF16",
    "F16",
    "F32",
    "FLOATS",
    "FP8_E4M3",
    "I32",
    "I64",
    "U8",
    "Format",
    "known",
    "parse",
    "register",
    "stored_as",
]
