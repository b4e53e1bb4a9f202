"""Penalties, biases and bans, in one launch: each program has a slice of a row's vocabulary to itself.

Of a row that adjusts, the slice of the result is first of all memory for marks, one number for each token: how often it
came behind the prompt, whether it was seen, whether it is banned. The program reads the history and the lists and marks
what falls into its slice; then it computes the slice from logits and marks. Marks are integers, so that the order in
which threads set them does not matter. Other rows are copied.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNT = tl.constexpr((1 << 20) - 1)  # a mark: bits that count,
SEEN = tl.constexpr(1 << 20)  # a token of the prompt,
BANNED = tl.constexpr(1 << 21)  # a token that must not come


@triton.jit
def _within(token, start, end):  # type: ignore[no-untyped-def]
    return (token >= start) & (token < end)


@triton.jit
def _mark(marks, token, mark, mine):  # type: ignore[no-untyped-def]
    tl.atomic_or(marks + token, mark, mask=mine, sem="relaxed")


@triton.jit
def _completes(numbers, at, mine, size, history, length):  # type: ignore[no-untyped-def]
    """Which of the places `at` of some numbers have size - 1 others before them that are the history's last."""
    same = mine & (size <= length + 1)
    back = 1
    while (back < size) & (tl.max(same.to(tl.int32), 0) > 0):
        same = same & (tl.load(numbers + at - back, mask=same, other=-1) == tl.load(history + length - back))
        back += 1
    return same


@triton.jit
def _mark_history(  # type: ignore[no-untyped-def]
    marks, history, length, prompt, size, start, end, BLOCK: tl.constexpr
):
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(history + at, mask=at < length, other=-1)
        mine = _within(token, start, end)
        _mark(marks, token, SEEN, mine & (at < prompt))
        tl.atomic_add(marks + token, 1, mask=mine & (at >= prompt), sem="relaxed")
        if size > 0:
            _mark(marks, token, BANNED, _completes(history, at, mine & (at >= size - 1), size, history, length))


@triton.jit
def _mark_words(  # type: ignore[no-untyped-def]
    marks, words, count, history, length, start, end, BLOCK: tl.constexpr
):
    """The last tokens of bad words whose others are the history's last: at once as many as follow in one size."""
    first, number = 0, tl.arange(0, BLOCK)
    while first < count:
        size = tl.load(words + first)
        word = first + number * (size + 1)
        other = tl.load(words + word, mask=word < count, other=0)
        alike = tl.min(tl.where(other == size, BLOCK, number), 0)  # what lies behind another size is no word's start
        last = tl.load(words + word + size, mask=number < alike, other=-1)
        mine = _within(last, start, end)
        _mark(marks, last, BANNED, _completes(words, word + size, mine, size, history, length))
        first += alike * (size + 1)


@triton.jit
def _mark_ends(marks, ends, count, start, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(ends + at, mask=at < count, other=-1)
        _mark(marks, token, BANNED, _within(token, start, end))


@triton.jit
def _biased(x, result, pairs, count, token, start, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x and the biases of its tokens; result [V] is where threads exchange them."""
    tl.store(result + token, x, mask=token < end)
    tl.debug_barrier()
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        other = tl.load(pairs + 2 * at, mask=at < count, other=-1)
        value = tl.load(pairs + 2 * at + 1, mask=at < count, other=0).to(tl.float32, bitcast=True)
        mine = _within(other, start, end)
        tl.store(result + other, tl.load(result + other, mask=mine, other=0.0) + value, mask=mine)
    tl.debug_barrier()
    x = tl.load(result + token, mask=token < end, other=0.0)
    tl.debug_barrier()
    return x


@triton.jit
def _penalised(x, mark, asked):  # type: ignore[no-untyped-def]
    repetition, presence, frequency = _real(asked + 2), _real(asked + 3), _real(asked + 4)
    count = mark & COUNT
    known = (mark & (COUNT | SEEN)) != 0
    x = tl.where(known, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = tl.where(count > 0, x - presence, x) - frequency * count.to(tl.float32)
    return tl.where((mark & BANNED) != 0, -float("inf"), x)


@triton.jit
def _real(place):  # type: ignore[no-untyped-def]
    return tl.load(place).to(tl.float32, bitcast=True)


@triton.jit
def _adjusted(  # type: ignore[no-untyped-def]
    x, result, asked, history, length, token, start, end, BLOCK: tl.constexpr
):
    ends, num_ends = asked + 16, tl.load(asked + 6)
    bias, num_bias = ends + num_ends, tl.load(asked + 7)
    if num_bias > 0:
        x = _biased(x, result, bias, num_bias, token, start, end, BLOCK)
    marks = result.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(marks + token, tl.zeros_like(token), mask=token < end)
    tl.debug_barrier()
    size = tl.load(asked + 5)
    if (size > 0) | (_real(asked + 2) != 1.0) | (_real(asked + 3) != 0.0) | (_real(asked + 4) != 0.0):
        _mark_history(marks, history, length, tl.load(asked), size, start, end, BLOCK)
    _mark_words(marks, bias + 2 * num_bias, tl.load(asked + 8), history, length, start, end, BLOCK)
    if length < tl.load(asked + 1):
        _mark_ends(marks, ends, num_ends, start, end, BLOCK)
    tl.debug_barrier()
    return _penalised(x, tl.load(marks + token, mask=token < end, other=0), asked)


@triton.jit
def adjust(  # type: ignore[no-untyped-def]
    logits,
    slots,
    logit_slots,
    sample_position,
    out,
    V: tl.constexpr,
    CONTROLS: tl.constexpr,
    CONTROLS_AT: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [L,V]: the logits as the rows' requests want them. One program for each slice of each row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start, row = tl.program_id(0) * SLICE, tl.program_id(1)
    end = tl.minimum(start + SLICE, V)
    token = start + tl.arange(0, SLICE)
    x = tl.load(logits + row.to(tl.int64) * V + token, mask=token < end, other=0.0).to(tl.float32)
    result = out + row.to(tl.int64) * V
    slot = tl.load(logit_slots + row)
    asked = slots + CONTROLS_AT + slot * CONTROLS
    if tl.load(asked + 9, mask=slot >= 0, other=0) != 0:
        history = slots + HISTORY_AT + slot * HISTORY
        x = _adjusted(x, result, asked, history, tl.load(sample_position + row), token, start, end, BLOCK)
    tl.store(result + token, tl.where(x == x, x, -float("inf")), mask=token < end)
