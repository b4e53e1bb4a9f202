"""The activated product by the kernel of `linear/hopper.py`."""

from __future__ import annotations

from penstock.kernels.linear.hopper import Hopper, HopperStream


class ActivatedHopper(Hopper):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"


class ActivatedHopperStream(HopperStream):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"
