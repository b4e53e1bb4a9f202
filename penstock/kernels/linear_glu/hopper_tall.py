"""The gated product by the kernel of `linear/hopper_tall.py`, with matching gate and up rows in one unit."""

from __future__ import annotations

from penstock.kernels.linear.hopper_tall import HopperTall


class GatedHopperTall(HopperTall):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"
