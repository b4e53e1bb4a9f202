"""Normalisation of heads, by the kernel of `rms_norm`."""

from __future__ import annotations

from penstock.kernels.rms_norm.rowwise import RowwiseNorm


class RowwiseHeadNorm(RowwiseNorm):
    """Heads lie one behind another, so they are short rows."""

    op = "head_rms_norm"
