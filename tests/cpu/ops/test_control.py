"""Penalties and bans against Hugging Face's processors; presence, frequency, biases and log-probabilities by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from penstock.ir.ops.control import MOST_LOGPROBS, Controls, adjust, logprobs
from penstock.ir.ops.state import SlotLayout

V = 13
LAYOUT = SlotLayout(num_slots=3, history=40, table=2, freqs=1)
SLOT = 1
tokens = st.integers(0, V - 1)
histories = st.lists(st.integers(0, 4) | tokens, max_size=39)
rows = st.lists(st.floats(-20, 20, width=16), min_size=V, max_size=V)


def arena(asked: Controls, known: Sequence[int], layout: SlotLayout = LAYOUT) -> torch.Tensor:
    """Slots of which one has these controls and this history; all else would do harm if it were read."""
    slots = torch.full((layout.size,), -1, dtype=torch.int32)
    for at, numbers in ((layout.controls_at + SLOT * layout.controls, asked.numbers), (_history(layout), known)):
        slots[at : at + len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return slots


def _history(layout: SlotLayout) -> int:
    return layout.history_at + SLOT * layout.history


def adjusted(asked: Controls, known: Sequence[int], row: Sequence[float], length: int | None = None) -> torch.Tensor:
    """One row's logits, after those of a padding row."""
    logits = torch.tensor([row, row])
    places = torch.tensor([[-1, SLOT], [0, len(known) if length is None else length]], dtype=torch.int32)
    out = adjust(logits, arena(asked, known), *places, **LAYOUT.attrs())
    assert torch.equal(out[0], logits[0])
    return out[1]


@given(histories, rows, st.floats(0.125, 3, width=16))
def test_repetition_penalty(known: list[int], row: list[float], penalty: float) -> None:
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([known]).long(), torch.tensor([row]))[0]
    found = adjusted(Controls(len(known) // 2, repetition_penalty=penalty), known, row)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@given(histories, rows, st.integers(1, 5))
def test_no_repeat_ngram(known: list[int], row: list[float], size: int) -> None:
    want = NoRepeatNGramLogitsProcessor(size)(torch.tensor([known]).long(), torch.tensor([row]))[0]
    assert torch.equal(adjusted(Controls(no_repeat_ngram_size=size), known, row), want)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=39), rows, st.data())
def test_bad_words(known: list[int], row: list[float], data: st.DataObject) -> None:
    """Words of some length whose first tokens are often the last known."""
    words = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6))
    words += [[*known[len(known) - n :], data.draw(tokens)] for n in data.draw(st.lists(st.integers(0, 3), max_size=2))]
    want = NoBadWordsLogitsProcessor(words)(torch.tensor([known]).long(), torch.tensor([row]))[0]
    assert torch.equal(adjusted(Controls(bad_words=tuple(map(tuple, words))), known, row), want)


def test_a_bad_word_as_long_as_the_history_and_one_is_banned() -> None:
    found = adjusted(Controls(bad_words=((3, 4, 5), (1, 3, 4, 6))), [3, 4], [0.0] * V)
    assert found.isinf().nonzero().flatten().tolist() == [5]


@given(histories, rows, st.integers(0, 40), st.sets(tokens, min_size=1, max_size=4))
def test_least_length(known: list[int], row: list[float], least: int, ends: set[int]) -> None:
    want = MinLengthLogitsProcessor(least, list(ends))(torch.tensor([known]).long(), torch.tensor([row]))[0]
    assert torch.equal(adjusted(Controls(0, least, ends=tuple(ends)), known, row), want)


@given(histories, rows, st.integers(0, 39), st.dictionaries(tokens, st.floats(-9, 9, width=16)))
def test_biases_then_penalties_in_order(
    known: list[int], row: list[float], prompt: int, bias: dict[int, float]
) -> None:
    asked = Controls(prompt, 0, 1.5, 0.75, 0.25, bias=tuple(bias.items()))
    want = []
    for token, x in enumerate(row):
        x += bias.get(token, 0.0)
        if token in known:
            x = x / 1.5 if x > 0 else x * 1.5
        times = known[prompt:].count(token)
        want.append(x - 0.75 * (times > 0) - 0.25 * times)
    torch.testing.assert_close(adjusted(asked, known, row), torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_tokens_behind_the_position_are_not_known_yet() -> None:
    row = [1.0] * V
    found = adjusted(Controls(1, 0, 2.0, 0.5), [3, 4, 5, 6], row, length=2)
    assert found.tolist() == [1, 1, 1, 0.5, 0, *([1.0] * 8)]


def test_rows_that_do_not_adjust_stay_and_what_is_no_number_is_minus_infinity() -> None:
    row = [math.nan, -math.inf, math.inf, *([1.0] * (V - 3))]
    want = torch.tensor([-math.inf, *row[1:]])
    logits, places = torch.tensor([row]), torch.tensor([[SLOT], [2]], dtype=torch.int32)
    for asked in (Controls(), Controls(repetition_penalty=2.0)):
        assert torch.equal(adjust(logits, arena(asked, [0, 1]), *places, **LAYOUT.attrs())[0], want)
    assert logits.isnan().any(), "the logits themselves were written"


@pytest.mark.parametrize(
    ("asked", "adjusts"),
    [
        (Controls(5, 5, ends=(1,), num_logprobs=3, by_adjusted=True), False),
        (Controls(5, 6, ends=(1,)), True),
        (Controls(5, 6), False),
        (Controls(repetition_penalty=0.5), True),
        (Controls(presence_penalty=-1.0), True),
        (Controls(frequency_penalty=1.0), True),
        (Controls(no_repeat_ngram_size=1), True),
        (Controls(bias=((1, 0.5),)), True),
        (Controls(bad_words=((1,),)), True),
    ],
)
def test_what_adjusts_says_so(asked: Controls, adjusts: bool) -> None:
    assert asked.adjusts is adjusts and asked.numbers[9] == adjusts


@given(
    st.builds(
        Controls, st.integers(0, 99), st.integers(0, 99), *[st.floats(-2, 2, width=32)] * 3, st.integers(0, 9),
        st.lists(tokens).map(tuple), st.lists(st.tuples(tokens, st.floats(width=32, allow_nan=False))).map(tuple),
        st.lists(st.lists(tokens, min_size=1).map(tuple)).map(tuple), st.integers(0, 33), st.booleans(),
    )
)  # fmt: skip
def test_numbers_are_read_as_they_were_written(asked: Controls) -> None:
    want = replace(asked, bad_words=tuple(sorted(asked.bad_words, key=len)))
    assert Controls.read([*asked.numbers, 7, 7]) == want


def scored(
    asked: Controls, known: Sequence[int], row: Sequence[float], other: Sequence[float], sampled: int, length: int
) -> tuple[list[int], list[float], float]:
    """One row's results, behind those of a padding row."""
    places = torch.tensor([[-1, SLOT], [0, length]], dtype=torch.int32)
    both = (torch.tensor([x, x]) for x in (row, other))
    chosen = torch.tensor([0, sampled], dtype=torch.int32)
    ids, values, own = logprobs(*both, chosen, arena(asked, known), *places, **LAYOUT.attrs())
    assert ids.shape == values.shape == (2, MOST_LOGPROBS)
    assert (ids[0] == -1).all() and not values[0].any() and own[0] == 0
    return ids[1].tolist(), values[1].tolist(), float(own[1])


@given(rows, rows, tokens, st.integers(0, 33), st.booleans(), st.integers(1, 39), st.data())
def test_log_probabilities(
    row: list[float], other: list[float], sampled: int, asked: int, by_adjusted: bool, prompt: int, data: st.DataObject
) -> None:
    known = data.draw(st.lists(tokens, min_size=prompt, max_size=39))
    length = data.draw(st.integers(0, len(known)))
    ids, values, own = scored(
        Controls(prompt, num_logprobs=asked, by_adjusted=by_adjusted), known, row, other, sampled, length
    )
    total = math.log(sum(math.exp(x) for x in row))
    ranked = other if by_adjusted else row
    best = sorted(range(V), key=lambda token: (-ranked[token], token))[: max(0, asked - 1)]
    assert ids == best + [-1] * (MOST_LOGPROBS - len(best))
    want = [ranked[token] - total for token in best] + [0.0] * (MOST_LOGPROBS - len(best))
    assert values == pytest.approx(want, abs=1e-5)
    following = known[length] if length < prompt else sampled
    assert own == pytest.approx(row[following] - total if asked else 0.0, abs=1e-5)


def test_infinite_logits_have_definite_log_probabilities() -> None:
    asked = Controls(num_logprobs=4)
    nothing = [math.nan] * V
    assert scored(asked, [], nothing, nothing, 2, 0)[1:] == ([-math.inf] * 3 + [0.0] * 29, -math.inf)
    one = [0.0, math.inf, *([math.nan] * (V - 2))]
    ids, values, own = scored(asked, [], one, one, 1, 0)
    assert (ids[:3], values[:3], own) == ([1, 0, 2], [0.0, -math.inf, -math.inf], 0.0)


def test_tokens_that_are_equal_come_in_order_and_banned_ones_last() -> None:
    row = [-math.inf, 1.0, 2.0, 1.0, *([-math.inf] * (V - 4))]
    ids, values, _ = scored(Controls(num_logprobs=6), [], row, row, 1, 0)
    assert ids[:6] == [2, 1, 3, 0, 4, -1] and values[3:5] == [-math.inf, -math.inf]
