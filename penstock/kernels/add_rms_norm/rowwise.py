"""A residual sum and its normalisation in one kernel."""

from __future__ import annotations

from penstock.kernels.rms_norm.rowwise import RowwiseNorm


class RowwiseAddNorm(RowwiseNorm):
    """The sum is taken on the way, and written too."""

    op = "add_rms_norm"
