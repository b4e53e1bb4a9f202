"""The sampling reference: Hugging Face's filters, the stated distribution, and draws that depend on nothing else."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.ir.ops.sample import sample, uniform

ROWS = 20_000


def _draw(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float = 0.0, rows: int = ROWS
) -> torch.Tensor:
    many = logits.expand(rows, -1)
    fill = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    floats = {name: torch.full((rows,), value) for name, value in fill.items()}
    k = torch.full((rows,), top_k, dtype=torch.int32)
    seeds = torch.arange(rows, dtype=torch.int32)
    position = torch.full((rows,), 3, dtype=torch.int32)
    return sample(many, floats["temperature"], k, floats["top_p"], floats["min_p"], seeds, position)


def _warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1)


def test_draws_follow_hugging_faces_filtered_distribution() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    for filters in (
        (1.0, 0, 1.0, 0.0), (0.7, 10, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.9, 20, 0.9, 0.0),
        (1.0, 0, 1.0, 0.1), (1.6, 0, 1.0, 0.02), (1.3, 12, 1.0, 0.15), (1.2, 0, 0.9, 0.06), (1.5, 20, 0.95, 0.2),
    ):  # fmt: skip
        want = _warped(logits, *filters)
        counts = torch.bincount(_draw(logits, *filters), minlength=50).double()
        assert counts[want == 0].sum() == 0, "a token that the filters drop was drawn"
        live = want > 0
        chi = ((counts - ROWS * want)[live] ** 2 / (ROWS * want)[live]).sum()
        degrees = int(live.sum()) - 1
        assert degrees > 1 and chi < degrees + 5 * (2 * degrees) ** 0.5, (filters, float(chi))


def test_min_p_keeps_what_is_likely_enough_and_always_the_likeliest() -> None:
    logits = torch.tensor([3.0, 3.0, 2.0, -1.0])
    assert set(_draw(logits, 1.0, 0, 1.0, 1.0, rows=2000).tolist()) == {0, 1}
    assert set(_draw(logits, 1.0, 0, 1.0, 0.36, rows=2000).tolist()) == {0, 1, 2}  # exp(-1) is 0.3679
    assert set(_draw(logits, 1.0, 0, 1.0, 0.37, rows=2000).tolist()) == {0, 1}
    assert set(_draw(logits, 2.0, 0, 1.0, 0.6, rows=2000).tolist()) == {0, 1, 2}  # of the scaled logits


def test_temperature_zero_is_the_largest_logit_and_the_lowest_id_of_equals() -> None:
    logits = torch.tensor([1.0, 5.0, 5.0, 2.0])
    assert _draw(logits, 0.0, 0, 1.0, rows=4).tolist() == [1, 1, 1, 1]


def test_equal_logits_at_the_border_are_kept_together() -> None:
    drawn = set(_draw(torch.tensor([3.0, 1.0, 1.0, 0.0]), 1.0, 2, 1.0, rows=4000).tolist())
    assert drawn == {0, 1, 2}


def test_a_draw_depends_on_seed_position_and_token_alone() -> None:
    seeds, positions = torch.tensor([7, 8, 7]), torch.tensor([1, 1, 2])
    many = uniform(seeds, positions, 100)
    assert torch.equal(many[0], uniform(seeds[:1], positions[:1], 100)[0])
    assert torch.equal(many[0, :10], uniform(seeds[:1], positions[:1], 10)[0])
    assert not torch.equal(many[0], many[1]) and not torch.equal(many[0], many[2])


def test_draws_are_uniform_and_never_0_or_1() -> None:
    draws = uniform(torch.arange(2000), torch.zeros(2000, dtype=torch.int32), 500)
    assert draws.gt(0).all() and draws.lt(1).all()
    counts = torch.histc(draws, 100, 0, 1).double()
    chi = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi < 99 + 5 * (2 * 99) ** 0.5
