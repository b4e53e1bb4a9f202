"""A tensor capped softly, as `add` streams its operands."""

from __future__ import annotations

from penstock.kernels.add.elementwise import ElementwiseAdd


class ElementwiseSoftcap(ElementwiseAdd):
    """A flat stream; shapes do not matter."""

    op = "softcap"
