"""State groups: the layers whose state has one class and one size, and how many blocks of it fit a budget of memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.errors import ResourceError

StateKind = Literal["paged"]


@dataclass(frozen=True)
class StateGroup:
    """Layers that share a pool and a row of the block table.

    One block holds keys and values of `block_size` tokens for every layer of the group: per layer two arrays
    [block_size, K, D] of `element_bytes` bytes an element. `kv_heads` is what this rank holds.
    """

    name: str
    kind: StateKind
    block_size: int
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    element_bytes: int

    def __post_init__(self) -> None:
        sizes = (self.block_size, self.kv_heads, self.head_dim, self.element_bytes)
        assert min(sizes) >= 1, f"state group {self.name} has an empty dimension: {self}"
        assert self.layers, f"state group {self.name} has no layers"
        assert len(set(self.layers)) == len(self.layers), f"state group {self.name} lists a layer twice: {self.layers}"

    @property
    def bytes_per_token(self) -> int:
        """2 (key, value) x layers x K x D x bytes of an element."""
        return 2 * len(self.layers) * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * self.bytes_per_token

    def blocks_for_tokens(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one request."""
        return -(-num_tokens // self.block_size)

    def blocks_for_limits(self, max_batch_size: int, max_seq_len: int) -> int:
        """The most blocks ever used at once, the dummy included: a larger pool is memory wasted."""
        return 1 + max_batch_size * self.blocks_for_tokens(max_seq_len)

    def blocks_for_budget(self, num_bytes: int) -> int:
        """Blocks (the dummy included) that `num_bytes` bytes hold; ResourceError if not even one request block fits."""
        num_blocks = num_bytes // self.bytes_per_block
        if num_blocks < 2:
            raise ResourceError(
                f"{num_bytes} bytes are left for KV, and one request needs {2 * self.bytes_per_block}: two blocks of "
                f"{self.block_size} tokens, {self.bytes_per_block} bytes each (one is the dummy for padding); raise "
                f"gpu_memory_utilization or max_gpu_bytes, or lower max_num_tokens"
            )
        return num_blocks
