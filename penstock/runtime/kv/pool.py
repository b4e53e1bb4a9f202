"""The memory of KV pools, and of states by slot: one tensor a layer, allocated once. Alone in `kv` it touches torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.memory import Limits, kv_bytes, least_blocks, share_blocks
from penstock.errors import ResourceError
from penstock.ir.lazy import torch
from penstock.kernels.launch import view

CPU_POOL_BYTES = 2 << 30  # a CPU's share of memory is the user's to spend on other things


def choose_blocks(engine: Engine, budget: int, limits: Limits | None = None) -> tuple[int, ...]:
    """Blocks of each of a CPU's pools, dummies included: as many as the budget holds, no more than the limits can use.

    Raises ResourceError where not even one request of max_seq_len fits, saying what to lower.
    """
    bounds: Limits = limits or engine.profile
    blocks = share_blocks(engine, budget, bounds)
    if blocks is None:
        need = kv_bytes(engine, least_blocks(engine, bounds))
        raise ResourceError(
            f"{max(budget, 0) / 2**20:.0f} MiB are left for KV and one request of max_seq_len={bounds.max_seq_len} "
            f"needs {need / 2**20:.0f} MiB; lower max_seq_len"
        )
    return blocks


def allocate(engine: Engine, blocks: Sequence[int], slots: int, take: Callable[[int], Any]) -> Mapping[str, Any]:
    """Zeroed tensors by state name: of so many blocks of each group, or of so many slots. `take` gives so many bytes, a
    u8 tensor."""
    counts = [*zip(engine.groups, blocks, strict=True), *((group, slots) for group in engine.by_slot)]
    states: dict[str, Any] = {}
    for group, count in counts:
        for node in group.states:
            type, sizes = node.types[0], {"N": count}
            states[node.name] = view(take(type.nbytes(sizes)), 0, type, sizes).zero_()
    return states


def host_bytes(size: int) -> Any:
    """Memory of the host."""
    return torch.empty(size, dtype=torch.uint8)
