"""Gating of the two halves of each row, by the kernel of `glu`."""

from __future__ import annotations

from penstock.kernels.glu.elementwise import Elementwise


class PackedElementwise(Elementwise):
    """The halves are told apart by an offset; nothing is split first."""

    op = "packed_glu"
