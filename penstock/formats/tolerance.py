"""The one table of numerical tolerances, with the reasoning beside each row.

`relative` bounds max|difference| / max|reference| over each row (last dimension) of one op's output, or of the logits.
`margin` is, in nats, how close the reference's two best tokens must be for another choice to be a rounding matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock import plugins
from penstock.errors import PluginError
from penstock.formats.base import Format


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What one format's results may differ by."""

    relative: float  # one op against its reference on the same inputs
    logits: float  # a whole model against the source of truth
    margin: float  # nats


_TABLE = {
    # Both sides sum in float32 in different orders; a dot of 14336 terms loses about 1e-6, a whole model about 1e-5.
    "f32": Tolerance(1e-4, 1e-4, 0.0),
    # 11 significant bits: 2**-11 per rounding; a fused op rounds fewer intermediates than its parts, so allow four.
    "f16": Tolerance(4e-3, 2e-2, 0.1),
    # 8 significant bits: 2**-8 per rounding (0.4 %); the same allowance of four roundings at the largest element.
    "bf16": Tolerance(1.6e-2, 1e-1, 0.1),
    # 4 significant bits: both sides round numbers that differ by less than this step, so they may end on neighbours,
    # which are at most an eighth of the smaller apart. It is stored, never computed in: the rows behind say no more.
    "fp8_e4m3": Tolerance(0.125, 0.125, 0.1),
    # Integers are exact.
    "i32": Tolerance(0.0, 0.0, 0.0),
    "i64": Tolerance(0.0, 0.0, 0.0),
    "u8": Tolerance(0.0, 0.0, 0.0),
}


def tolerance(format: Format) -> Tolerance:
    """The table's row of `format`."""
    if format.name not in _TABLE:
        raise PluginError(f"format {format.name!r} has no tolerances; its plugin has to register a row beside it")
    return _TABLE[format.name]


def register(format: Format, row: Tolerance) -> None:
    """The row of a plugin's format. Raises PluginError for one that has a row."""
    plugins.note("tolerance", format.name, format.name in _TABLE, lambda: _TABLE.pop(format.name))
    _TABLE[format.name] = row
