"""float8 of four exponent and three fraction bits, no infinity, largest number 448: how KV is kept at half the bytes.

It is stored without a scale: checkpoints that were not calibrated say none, and keys and values of the usual models
lie within its range. What is beyond it becomes the largest number, by every implementation alike.
"""

from __future__ import annotations

from penstock.formats.base import Format, register

FP8_E4M3 = register(Format("fp8_e4m3", 8, "float8_e4m3fn", "fp8e4nv", "F8_E4M3", True))
