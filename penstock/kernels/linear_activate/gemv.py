"""The activated product by the kernel of `linear/gemv.py`."""

from __future__ import annotations

from penstock.kernels.linear.gemv import Gemv


class ActivatedGemv(Gemv):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"
