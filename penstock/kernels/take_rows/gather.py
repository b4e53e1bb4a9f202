"""Chosen rows, by the kernel of `embedding`."""

from __future__ import annotations

from penstock.kernels.embedding.gather import GatherEmbedding


class GatherRows(GatherEmbedding):
    """The operands come in the other order."""

    op = "take_rows"
    indices, table = 1, 0
