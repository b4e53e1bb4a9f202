"""An activation without a gate, as `add` streams its operands."""

from __future__ import annotations

from penstock.kernels.add.elementwise import ElementwiseAdd


class ElementwiseActivation(ElementwiseAdd):
    """A flat stream; shapes do not matter."""

    op = "activate"
