"""The gated product by the kernel of `linear/gemv.py`, with matching gate and up rows in one program."""

from __future__ import annotations

from penstock.kernels.linear.gemv import Gemv


class GatedGemv(Gemv):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"
