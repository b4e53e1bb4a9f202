"""A residual sum and its normalisation about the mean, by the kernel of `rms_norm`."""

from __future__ import annotations

from penstock.kernels.rms_norm.rowwise import RowwiseNorm


class RowwiseAddLayerNorm(RowwiseNorm):
    """The sum is taken on the way, and written too."""

    op = "add_layer_norm"
