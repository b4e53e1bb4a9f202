"""The KV pool's memory: one tensor a layer, allocated once. The only module of `kv` that touches torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.manifest import Engine
from penstock.errors import ResourceError
from penstock.ir.lazy import torch

CPU_POOL_BYTES = 2 << 30  # a CPU's share of memory is the user's to spend on other things


def choose_blocks(engine: Engine, budget: int) -> int:
    """Blocks of the pool, the dummy included: as many as the budget holds, no more than the limits can use.

    Raises ResourceError where not even one request of max_seq_len fits, saying what to lower.
    """
    profile = engine.profile
    most = 1 + profile.max_batch_size * profile.table_width
    blocks = min(most, budget // engine.block_bytes)
    if blocks < 1 + profile.table_width:
        need = (1 + profile.table_width) * engine.block_bytes
        raise ResourceError(
            f"{max(budget, 0) / 2**20:.0f} MiB are left for KV and one request of max_seq_len={profile.max_seq_len} "
            f"needs {need / 2**20:.0f} MiB; lower max_seq_len or max_num_tokens, or raise gpu_memory_utilization or "
            f"max_gpu_bytes"
        )
    return blocks


def allocate(engine: Engine, blocks: int, device: str) -> Mapping[str, Any]:
    """Zeroed KV tensors by state name."""
    sizes = {"N": blocks}
    return {
        node.name: torch.zeros(
            node.types[0].concrete(sizes), dtype=getattr(torch, node.types[0].format.torch_dtype), device=device
        )
        for node in engine.states
    }
