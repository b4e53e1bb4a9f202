"""The KV pool's memory: one tensor a layer, allocated once. The only module of `kv` that touches torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.memory import Limits
from penstock.errors import ResourceError
from penstock.ir.lazy import torch
from penstock.kernels.launch import view

CPU_POOL_BYTES = 2 << 30  # a CPU's share of memory is the user's to spend on other things


def choose_blocks(engine: Engine, budget: int, limits: Limits | None = None) -> int:
    """Blocks of a CPU's pool, the dummy included: as many as the budget holds, no more than the limits can use.

    Raises ResourceError where not even one request of max_seq_len fits, saying what to lower.
    """
    bounds: Limits = limits or engine.profile
    width = -(-bounds.max_seq_len // engine.profile.block_size)
    blocks = min(1 + bounds.max_batch_size * width, budget // engine.block_bytes)
    if blocks < 1 + width:
        need = (1 + width) * engine.block_bytes
        raise ResourceError(
            f"{max(budget, 0) / 2**20:.0f} MiB are left for KV and one request of max_seq_len={bounds.max_seq_len} "
            f"needs {need / 2**20:.0f} MiB; lower max_seq_len"
        )
    return blocks


def allocate(engine: Engine, blocks: int, take: Callable[[int], Any]) -> Mapping[str, Any]:
    """Zeroed KV tensors by state name. `take` gives so many bytes, a u8 tensor."""
    states: dict[str, Any] = {}
    for node in engine.states:
        type, sizes = node.types[0], {"N": blocks}
        states[node.name] = view(take(type.nbytes(sizes)), 0, type, sizes).zero_()
    return states


def host_bytes(size: int) -> Any:
    """Memory of the host."""
    return torch.empty(size, dtype=torch.uint8)
