"""The gated product by the kernel of `linear/hopper.py`, with matching gate and up rows in one tile."""

from __future__ import annotations

from penstock.kernels.linear.hopper import Hopper, HopperStream


class GatedHopper(Hopper):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"


class GatedHopperStream(HopperStream):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"
