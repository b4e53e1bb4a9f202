"""The gated product by the kernel of `linear/skinny.py`, with matching gate and up rows in one program."""

from __future__ import annotations

from penstock.kernels.linear.skinny import Skinny


class GatedSkinny(Skinny):
    """act(gate) * up is formed in float32, before anything is rounded or stored."""

    op = "linear_glu"
