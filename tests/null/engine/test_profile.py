"""Buckets: every step fits one, with bounded waste, and one function names it."""

from __future__ import annotations

from itertools import pairwise

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


def test_at_most_twelve_buckets_are_tuned() -> None:
    assert len(PROFILE.tuned_buckets) <= 12
    assert all(PROFILE.tuned(t) in PROFILE.tuned_buckets for t in PROFILE.token_buckets)


def test_the_largest_upload_fits() -> None:
    """Every slot filled anew, every token a prompt's."""
    layout = PROFILE.slots
    pairs = PROFILE.max_num_tokens + layout.num_slots * (5 + layout.table)
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
