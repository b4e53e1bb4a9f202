"""A tensor times a constant, as `add` streams its operands."""

from __future__ import annotations

from penstock.kernels.add.elementwise import ElementwiseAdd


class ElementwiseScale(ElementwiseAdd):
    """A flat stream; shapes do not matter."""

    op = "scale"
