"""The activated product by the kernel of `linear/skinny.py`."""

from __future__ import annotations

from penstock.kernels.linear.skinny import Skinny


class ActivatedSkinny(Skinny):
    """The bias and the activation are applied in float32, before anything is rounded or stored."""

    op = "linear_activate"
