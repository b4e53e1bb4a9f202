"""What `sample` draws, by the numbers: the kernels are held to the reference, and the reference to the distribution."""

from __future__ import annotations

import torch

from penstock.ir.op import get

DRAWS = 40000
LOGITS = (2.0, 1.0, 1.0, 0.0, -1.0, -3.0)


def frequencies(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    logits = torch.tensor([LOGITS]).expand(DRAWS, -1)
    column = torch.ones(DRAWS)
    position = torch.arange(DRAWS, dtype=torch.int32)
    seed = torch.full_like(position, 1234)
    k = torch.full_like(position, top_k)
    tokens = get("sample").reference(logits, column * temperature, k, column * top_p, column * 0, seed, position)
    return torch.bincount(tokens, minlength=len(LOGITS)) / DRAWS


def check(found: torch.Tensor, kept: int, temperature: float) -> None:
    want = (torch.tensor(LOGITS[:kept]) / temperature).softmax(0)
    spread = (want * (1 - want) / DRAWS).sqrt()
    assert ((found[:kept] - want).abs() <= 4.5 * spread).all(), (found, want)
    assert (found[kept:] == 0).all()


def test_draws_follow_the_softmax() -> None:
    check(frequencies(0.8, 0, 1.0), len(LOGITS), 0.8)


def test_top_k_keeps_ties() -> None:
    check(frequencies(1.5, 2, 1.0), 3, 1.5)


def test_top_p_keeps_what_first_reaches_it() -> None:
    check(frequencies(1.0, 0, 0.85), 3, 1.0)  # the first three hold 0.9007
    check(frequencies(1.0, 0, 0.92), 4, 1.0)


def test_top_p_is_taken_of_what_top_k_kept() -> None:
    check(frequencies(1.0, 3, 0.58), 3, 1.0)  # the first holds 0.576 of the three
    check(frequencies(1.0, 3, 0.57), 1, 1.0)
