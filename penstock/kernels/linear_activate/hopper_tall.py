"""The activated product by the kernel of `linear/hopper_tall.py`."""

from __future__ import annotations

from penstock.kernels.linear.hopper_tall import HopperTall


class ActivatedHopperTall(HopperTall):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"
