"""Normalisation of heads about their mean, by the kernel of `rms_norm`."""

from __future__ import annotations

from penstock.kernels.rms_norm.rowwise import RowwiseNorm


class RowwiseHeadLayerNorm(RowwiseNorm):
    """Heads lie one behind another, so they are short rows, with weights in turn."""

    op = "head_layer_norm"
