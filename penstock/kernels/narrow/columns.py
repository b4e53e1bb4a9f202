"""The first columns, by the kernel of `split`, which leaves the rest unread."""

from __future__ import annotations

from penstock.kernels.split.columns import SplitColumns


class NarrowColumns(SplitColumns):
    """One group alone."""

    op = "narrow"
