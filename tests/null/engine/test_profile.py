"""Buckets: every step fits one, with bounded waste, and one function names it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.profile import Profile
from penstock.errors import OptionError

PROFILE = Profile(64, 8192, 4096)


@given(st.integers(1, 8192), st.integers(0, 64))
def test_every_step_has_a_bucket_that_holds_it(tokens: int, logits: int) -> None:
    size, rows = PROFILE.bucket(tokens, min(tokens, max(logits, 1)))
    assert size >= tokens and rows >= min(tokens, logits)
    assert f"T{size}.L{rows}" in PROFILE.buckets()


def test_buckets_step_by_at_most_32_up_to_512_and_waste_at_most_12_percent_above() -> None:
    sizes = PROFILE.token_buckets
    for below, above in pairwise(sizes):
        if above <= 512:
            assert above - below <= 32
        else:
            assert (above - below - 1) / above <= 0.12


def test_few_buckets_are_tuned() -> None:
    assert len(PROFILE.tuned_buckets) <= 16
    assert all(PROFILE.tuned(t) in PROFILE.tuned_buckets for t in PROFILE.token_buckets)


def test_the_largest_upload_fits() -> None:
    """Every slot filled anew, every token a prompt's, and one more of each that scores."""
    layout = PROFILE.slots
    pairs = 2 * PROFILE.max_num_tokens + layout.num_slots * (1 + 6 + layout.table + layout.controls)
    assert PROFILE.upload_size == 4 + 3 * layout.num_slots + 2 * pairs


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"max_num_tokens": 8}, "max_num_tokens=8 is below max_batch_size=64"),
        ({"block_size": 48}, "block_size=48"),
    ],
)
def test_contradictions_are_named(limits: dict[str, int], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Profile(**({"max_batch_size": 64, "max_num_tokens": 8192, "max_seq_len": 4096} | limits))


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_batch_size": "4"}, "max_batch_size='4' is a str"),
        ({"max_batch_size": 2.5}, "max_batch_size=2.5 is a float"),
        ({"max_batch_size": True}, "max_batch_size=True is a bool"),
        ({"max_num_tokens": None}, "max_num_tokens=None is a NoneType"),
        ({"max_seq_len": "64"}, "max_seq_len='64' is a str"),
        ({"max_seq_len": 100.5}, r"max_seq_len=100.5 is a float"),
        ({"max_seq_len": 1}, "max_seq_len=1 must be at least 2"),
        ({"block_size": "16"}, "block_size='16' is a str"),
        ({"block_size": 16.0}, "block_size=16.0 is a float"),
        ({"block_size": 1 << 30}, "block_size=1073741824 must be a power of two, from 16 to 1024"),
        ({"freqs": -1}, "freqs=-1 must be at least 0"),
        ({"max_batch_size": 10**7, "max_num_tokens": 10**7}, "lower max_batch_size or max_seq_len"),
        ({"max_batch_size": 10**9, "max_num_tokens": 10**9, "max_seq_len": 2}, "lower max_batch_size or max_seq_len"),
        ({"max_seq_len": 2**31}, "lower max_batch_size or max_seq_len"),
        ({"max_num_tokens": 2**31}, "lower max_num_tokens"),
    ],
)
def test_limits_that_are_no_sane_integers_are_named(limits: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Profile(**({"max_batch_size": 64, "max_num_tokens": 8192, "max_seq_len": 4096} | limits))


def test_the_largest_indexable_slots_are_allowed() -> None:
    """(2**31 - 1) numbers in slots of 6 fields, 1000 blocks, controls and a history of 64000 + 1 tokens each."""
    most = (2**31 - 1) // (6 + 1000 + 1024 + 64001)
    assert Profile(most, most, 64000).slots.size <= 2**31 - 1
    with pytest.raises(OptionError, match="need slots of"):
        Profile(most + 1, most + 1, 64000)
