"""Books over small pools, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.runtime.kv.blocks import BlockPool
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Tables


class Books(KvManager):
    """Of one group of layers."""

    @property
    def only(self) -> Tables:
        return self.groups[0]


def books(blocks: int, size: int, window: int = 0, reuse: bool = True, hosts: int = 0) -> Books:
    """Of one group of layers."""
    return Books([Tables(BlockPool(blocks, size), window, host_blocks=hosts)], reuse)


def mixed(blocks: Sequence[int], size: int, windows: Sequence[int], reuse: bool = True, hosts: int = 0) -> KvManager:
    """Of several, each with its number of blocks and its window, 0: none."""
    pools = [BlockPool(count, size, group) for group, count in enumerate(blocks)]
    return KvManager([Tables(p, w, host_blocks=hosts) for p, w in zip(pools, windows, strict=True)], reuse)
