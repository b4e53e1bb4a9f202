"""What requests ask of their logits beyond sampling: penalties, biases, bans, and the log-probabilities of tokens.

A slot has `SlotLayout.controls` numbers for it, i32, floats as their bits. Few requests ask, so a step in which none
does runs without these ops, and rows that ask nothing pass through them unchanged.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import CONTEXT, fill, integers
from penstock.ir.ops.state import SlotLayout

MOST_LOGPROBS = 32
# A slot's first numbers, in this order; from LISTS on: the ends, (token, value) of biases, (length, tokens) of words.
NUMBERS = (
    "prompt_length", "least_length", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "num_ends", "num_bias", "num_bad", "adjusts", "num_logprobs", "by_adjusted",
)  # fmt: skip
ADJUSTS, NUM_LOGPROBS = NUMBERS.index("adjusts"), NUMBERS.index("num_logprobs")
LISTS = 16


@dataclass(frozen=True, slots=True)
class Controls:
    """What a slot's numbers say of its request. Tokens are ids of the vocabulary."""

    prompt_length: int = 0
    least_length: int = 0  # tokens, the prompt's too, before which none of `ends` may come
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    ends: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()  # at most one for each token
    bad_words: tuple[tuple[int, ...], ...] = ()  # none is empty
    num_logprobs: int = 0  # 0: none are asked for; n + 1: the chosen token's and the n best
    by_adjusted: bool = False  # the best are those of the adjusted logits

    @property
    def adjusts(self) -> bool:
        """Whether the row's logits change at all."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        held = self.ends and self.least_length > self.prompt_length
        return bool(any(penalties) or self.no_repeat_ngram_size or self.bias or self.bad_words or held)

    @property
    def numbers(self) -> list[int]:
        """As a slot has them, without the unused ones at the end."""
        penalties = map(_bits, (self.repetition_penalty, self.presence_penalty, self.frequency_penalty))
        bias = [x for token, value in self.bias for x in (token, _bits(value))]
        bad = [x for word in sorted(self.bad_words, key=len) for x in (len(word), *word)]  # kernels take a size at once
        return [
            *(self.prompt_length, self.least_length, *penalties, self.no_repeat_ngram_size),
            *(len(self.ends), len(self.bias), len(bad), int(self.adjusts), self.num_logprobs, int(self.by_adjusted)),
            *([0] * (LISTS - len(NUMBERS)) + [*self.ends] + bias + bad),
        ]

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Controls:
        """The inverse of `numbers`, but for the order of bad words; what lies behind them does not matter."""
        given = dict(zip(NUMBERS, numbers[: len(NUMBERS)], strict=True))
        bias_at = LISTS + given["num_ends"]
        bad_at = bias_at + 2 * given["num_bias"]
        pairs = zip(numbers[bias_at:bad_at:2], map(_float, numbers[bias_at + 1 : bad_at : 2]), strict=True)
        return cls(
            given["prompt_length"],
            given["least_length"],
            _float(given["repetition_penalty"]),
            _float(given["presence_penalty"]),
            _float(given["frequency_penalty"]),
            given["no_repeat_ngram_size"],
            tuple(numbers[LISTS:bias_at]),
            tuple(pairs),
            tuple(_words(numbers[bad_at : bad_at + given["num_bad"]])),
            given["num_logprobs"],
            bool(given["by_adjusted"]),
        )


def _bits(x: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", x))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


def _words(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    words, at = [], 0
    while at < len(numbers):
        words.append(tuple(numbers[at + 1 : at + 1 + numbers[at]]))
        at += 1 + numbers[at]
    return words


def _adjust(logits: Type, slots: Type, logit_slots: Type, sample_position: Type, **_: int) -> Type:
    return tensor("f32", *logits.shape)


def adjust_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Rows of every kind, the last of several a padding row; histories as long as are common, full of repetitions."""
    layout, rows = SlotLayout(**attrs), sizes["L"]
    vocabulary = int(types[0].shape[-1])
    length = max(1, min(CONTEXT, layout.history - 1))
    slots = torch.zeros(layout.size, dtype=torch.int32, device=device)
    histories = slots[layout.history_at :].view(layout.num_slots, layout.history)
    histories[:, 0::2] = integers(0, vocabulary, histories[:, 0::2].shape, generator, device)
    histories[:, 1::2] = integers(0, min(vocabulary, 9), histories[:, 1::2].shape, generator, device)
    own = slots[layout.controls_at : layout.history_at].view(layout.num_slots, layout.controls)
    for slot in range(layout.num_slots):
        end = histories[slot, max(0, length - 2) : length].tolist()
        numbers = torch.tensor(_kind(slot, length, vocabulary, end).numbers, dtype=torch.int32)
        own[slot, : len(numbers)] = numbers.to(device)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    logit_slots = torch.where((row == rows - 1) & (rows > 1), -1, row % layout.num_slots)
    logits = fill(types[0], sizes, generator, device) * 3
    return [logits, slots, logit_slots, torch.full((rows,), length, dtype=torch.int32, device=device)]


def _kind(slot: int, length: int, vocabulary: int, end: Sequence[int]) -> Controls:
    """One of several kinds of requests; `end`: the last tokens of its history."""
    last, prompt, some = vocabulary - 1, length // 2, tuple(range(min(3, vocabulary)))
    bias = tuple((token, 1.5 - token) for token in (*some[1:], last) if token < vocabulary)
    words = ((last // 2,), (*end, last // 3), (last, last // 4))
    kinds = (
        Controls(prompt, 0, 1.3, 0.5, 0.25, 3, bias=tuple(dict(bias).items()), num_logprobs=6),
        Controls(prompt, length + 1, ends=some, bad_words=words, num_logprobs=21, by_adjusted=True),
        Controls(prompt, num_logprobs=1),
        Controls(length + 1, 0, 0.8, no_repeat_ngram_size=2, num_logprobs=MOST_LOGPROBS + 1),
        Controls(prompt, length, 1.0, 0.5, ends=some, bad_words=words[1:]),
        Controls(),
    )
    return kinds[slot % len(kinds)]


@op(_adjust, example=adjust_example)
def adjust(logits: Any, slots: Any, logit_slots: Any, sample_position: Any, **attrs: int) -> Any:
    """The logits after what the rows' requests ask of them: [L,V], in float32.

    slots: i32[A]; logit_slots: i32[L], -1 for padding; sample_position: i32[L], how many tokens are known. In this
    order: biases are added; logits of known tokens are divided by repetition_penalty if above 0, else multiplied; those
    of tokens behind the prompt lose presence_penalty, and frequency_penalty for each time. Then minus infinity for the
    token that would repeat an n-gram, the last one of a bad word whose others are the last known, and `ends` while
    fewer than least_length are known. A logit that is not a number becomes minus infinity.
    """
    layout = SlotLayout(**attrs)
    out = logits.float().clone()
    for row, (slot, length) in enumerate(zip(logit_slots.tolist(), sample_position.tolist(), strict=True)):
        numbers = _numbers(layout, slots, slot) if slot >= 0 else []
        if numbers and numbers[ADJUSTS]:
            out[row] = _adjusted(out[row], Controls.read(numbers), _history(layout, slots, slot)[:length])
    return torch.where(out.isnan(), -torch.inf, out)


def _numbers(layout: SlotLayout, slots: Any, slot: int) -> list[int]:
    return list(slots[layout.controls_at + slot * layout.controls :][: layout.controls].tolist())


def _history(layout: SlotLayout, slots: Any, slot: int) -> Any:
    return slots[layout.history_at + slot * layout.history :][: layout.history].long()


def _adjusted(x: Any, asked: Controls, known: Any) -> Any:
    for token, value in asked.bias:
        x[token] += value
    seen = known.bincount(minlength=x.numel()) > 0
    count = known[asked.prompt_length :].bincount(minlength=x.numel())
    penalty = asked.repetition_penalty
    x = torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x)
    x = x - asked.presence_penalty * (count > 0) - asked.frequency_penalty * count
    x[_banned(asked, known)] = -torch.inf
    return x


def _banned(asked: Controls, known: Any) -> list[int]:
    size, tokens = asked.no_repeat_ngram_size, known.tolist()
    banned = list(asked.ends) if len(tokens) < asked.least_length else []
    banned += [word[-1] for word in asked.bad_words if _ends(tokens, word[:-1])]
    if 0 < size <= len(tokens):
        grams = known.unfold(0, size, 1)
        banned += grams[(grams[:, :-1] == known[len(tokens) - size + 1 :]).all(1), -1].tolist()
    return banned


def _ends(tokens: Sequence[int], last: Sequence[int]) -> bool:
    return len(last) <= len(tokens) and tuple(tokens[len(tokens) - len(last) :]) == tuple(last)


def _logprobs(
    logits: Type, adjusted: Type, sampled: Type, slots: Type, logit_slots: Type, sample_position: Type, **_: int
) -> tuple[Type, ...]:
    rows = logits.shape[:1]
    return tensor("i32", *rows, MOST_LOGPROBS), tensor("f32", *rows, MOST_LOGPROBS), tensor("f32", *rows)


def logprobs_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """As for `adjust`; adjusted logits are others, some of them forbidden."""
    logits, *rest = adjust_example((types[0], *types[3:]), attrs, sizes, generator, device)
    adjusted = fill(types[1], sizes, generator, device) * 3
    adjusted[:, ::3] = -torch.inf
    sampled = integers(0, int(types[0].shape[-1]), (sizes["L"],), generator, device)
    return [logits, adjusted, sampled, *rest]


@op(_logprobs, example=logprobs_example)
def logprobs(
    logits: Any, adjusted: Any, sampled: Any, slots: Any, logit_slots: Any, sample_position: Any, **attrs: int
) -> Any:
    """Log-probabilities of the logits [L,V] at temperature 1: of the best tokens in order, and of the row's own.

    adjusted: [L,V]; sampled: i32[L]; the rest as for `adjust`. Returns the ids i32[L,32] and values f32[L,32] of the
    best, the lower id first where equal, and f32[L]: of the prompt's next token within a prompt, else of `sampled`.
    Where by_adjusted is set the best are those of `adjusted`, and their values the logits there less the logarithm of
    the sum of exponentials here. What was not asked for: id -1, value 0. Not a number counts as minus infinity.
    """
    layout = SlotLayout(**attrs)
    ids = torch.full((logits.shape[0], MOST_LOGPROBS), -1, dtype=torch.int32, device=logits.device)
    values, own = torch.zeros_like(ids, dtype=torch.float32), torch.zeros(logits.shape[0], device=logits.device)
    for row, (slot, length) in enumerate(zip(logit_slots.tolist(), sample_position.tolist(), strict=True)):
        numbers = _numbers(layout, slots, slot) if slot >= 0 else []
        if numbers and numbers[NUM_LOGPROBS]:
            asked, raw = Controls.read(numbers), _ordered(logits[row])
            total = raw.logsumexp(-1)
            ranked = _ordered(adjusted[row]) if asked.by_adjusted else raw
            best = ranked.sort(descending=True, stable=True).indices[: asked.num_logprobs - 1]
            ids[row, : len(best)], values[row, : len(best)] = best.int(), _less(ranked[best], total)
            own[row] = _less(raw[_own(layout, slots, slot, length, asked, sampled[row])], total)
    return ids, values, own


def _own(layout: SlotLayout, slots: Any, slot: int, length: int, asked: Controls, sampled: Any) -> Any:
    return _history(layout, slots, slot)[length] if length < asked.prompt_length else sampled.long()


def _ordered(x: Any) -> Any:
    return torch.where(x.isnan(), -torch.inf, x.float())


def _less(x: Any, total: Any) -> Any:
    """x - total; of the infinite nothing is left where they are equal, but minus infinity stays."""
    return torch.where(x == -torch.inf, x, torch.where(x == total, 0.0, x - total))
