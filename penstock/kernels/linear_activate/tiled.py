"""The activated product by the kernel of `linear/tiled.py`."""

from __future__ import annotations

from penstock.kernels.linear.tiled import Tiled


class ActivatedTiled(Tiled):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"
