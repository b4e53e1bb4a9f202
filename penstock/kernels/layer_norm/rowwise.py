"""Normalisation about the mean, by the kernel of `rms_norm`."""

from __future__ import annotations

from penstock.kernels.rms_norm.rowwise import RowwiseNorm


class RowwiseLayerNorm(RowwiseNorm):
    """The mean is taken out before squares are summed: both passes over registers."""

    op = "layer_norm"
