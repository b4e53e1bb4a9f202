"""The gated product by the kernel of `linear/tiled.py`, with matching gate and up rows in one program."""

from __future__ import annotations

from penstock.kernels.linear.tiled import Tiled


class GatedTiled(Tiled):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"
