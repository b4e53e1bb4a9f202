"""State groups: sizes in bytes, blocks for a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from penstock.errors import ResourceError
from penstock.runtime.kv.groups import StateGroup

# Llama-3.1-8B in bf16: 32 layers x 8 KV heads x 128 x 2 x 2 bytes = 128 KiB a token.
LLAMA_8B = StateGroup("kv", "paged", 64, tuple(range(32)), kv_heads=8, head_dim=128, element_bytes=2)


def test_bytes() -> None:
    assert LLAMA_8B.bytes_per_token == 128 * 1024
    assert LLAMA_8B.bytes_per_block == 8 * 1024**2


def test_blocks() -> None:
    assert LLAMA_8B.blocks_for_budget(1024**3) == 128
    assert LLAMA_8B.blocks_for_budget(1024**3 - 1) == 127
    assert [LLAMA_8B.blocks_for_tokens(n) for n in (1, 64, 65)] == [1, 1, 2]
    assert LLAMA_8B.blocks_for_limits(max_batch_size=3, max_seq_len=100) == 7


def test_too_small_a_budget_is_refused_with_the_numbers() -> None:
    assert LLAMA_8B.blocks_for_budget(16 * 1024**2) == 2
    with pytest.raises(ResourceError, match=r"16777215 bytes .* needs 16777216.*gpu_memory_utilization"):
        LLAMA_8B.blocks_for_budget(16 * 1024**2 - 1)


def test_a_group_without_substance_is_our_bug() -> None:
    broken: dict[str, Any]
    for broken in ({"layers": ()}, {"layers": (1, 1)}, {"kv_heads": 0}, {"block_size": 0}):
        with pytest.raises(AssertionError):
            replace(LLAMA_8B, **broken)
