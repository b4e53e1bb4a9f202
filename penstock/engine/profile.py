"""The profile: the limits an engine is built for, and the buckets its steps are padded to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from penstock.engine.groups import StateGroup
from penstock.engine.program import Sizes, bucket_name, encoder_bucket
from penstock.errors import OptionError
from penstock.ir.ops.state import FIELDS, HEADER, ROW, SlotLayout

MAX_NUMBERS = 2**31 - 1  # what the device's 32-bit indices reach
MAX_BLOCK = 1024  # tokens
# A request is a token of prompt and one of output.
_LEAST = {"max_seq_len": 2, "freqs": 0, "slot_rows": 0, "encoder": 0}
_TUNED = (1, *(1 << i for i in range(2, 8)), 192, 224, *range(256, 513, 64), 2048, 8192)


@dataclass(frozen=True)
class Profile:
    """Limits. Raises OptionError where one is no integer, out of range, or contradicts another.

    max_batch_size: requests in a step; max_num_tokens: tokens in a step; max_seq_len: prompt and output of one request;
    block_size: tokens in a block of KV; freqs: rope frequencies kept by request (0 where the model's are fixed);
    tables: groups of layers that keep blocks, each with a block table; slot_rows: 1 where layers keep state by slot;
    encoder: 1 where an encoder reads a request's input, of which max_seq_len is the limit as well; or where the first
    tokens of a prompt see each other.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    block_size: int = 64
    freqs: int = 0
    tables: int = 1
    slot_rows: int = 0
    encoder: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_integer(name, value)
        if self.max_num_tokens < self.max_batch_size:
            raise OptionError(
                f"max_num_tokens={self.max_num_tokens} is below max_batch_size={self.max_batch_size}: "
                "a step must hold one token of every running request; raise the first or lower the second"
            )
        if self.block_size & (self.block_size - 1) or not 16 <= self.block_size <= MAX_BLOCK:
            raise OptionError(f"block_size={self.block_size} must be a power of two, from 16 to {MAX_BLOCK}")
        self._check_reach()

    def _check_reach(self) -> None:
        """Slots and uploads are each one flat tensor of 32-bit numbers, with 32-bit indices into it."""
        if self.slots.size > MAX_NUMBERS:
            raise OptionError(
                f"max_batch_size={self.max_batch_size} requests of max_seq_len={self.max_seq_len} tokens need slots of "
                f"{self.slots.size} numbers, at most {MAX_NUMBERS} can be indexed; lower max_batch_size or max_seq_len"
            )
        if self.upload_size > MAX_NUMBERS:
            raise OptionError(
                f"max_num_tokens={self.max_num_tokens} and max_batch_size={self.max_batch_size} need an upload of "
                f"{self.upload_size} numbers, at most {MAX_NUMBERS} can be indexed; lower max_num_tokens"
            )

    def for_groups(self, groups: Sequence[StateGroup]) -> Profile:
        """Of a model with these groups of states."""
        paged = sum(not group.by_slot for group in groups)
        encoder = int(any(group.fixed or group.whole for group in groups))
        return replace(self, tables=max(1, paged), slot_rows=int(paged < len(groups)), encoder=encoder)

    @property
    def table_width(self) -> int:
        """M: blocks of the longest sequence."""
        return -(-self.max_seq_len // self.block_size)

    @property
    def slots(self) -> SlotLayout:
        """The device's memory of running requests."""
        own = {"freqs": self.freqs, "tables": self.tables, "slot_rows": self.slot_rows, "encoder": self.encoder}
        return SlotLayout(self.max_batch_size, self.max_seq_len + 1, self.table_width, **own)

    @property
    def upload_size(self) -> int:
        """U: numbers of the largest upload, in which every slot is filled anew and every token is a prompt's, of each
        that scores one more; and a step's worth of tokens, or a request's, whose KV was found.
        """
        found = max(self.max_num_tokens, self.max_seq_len)
        per_slot = 1 + len(FIELDS) + self.tables * self.table_width + self.freqs + self.encoder + self.slots.controls
        return HEADER + ROW * self.max_batch_size + 2 * (self.max_num_tokens + found + self.max_batch_size * per_slot)

    @cached_property
    def token_buckets(self) -> tuple[int, ...]:
        """Capture buckets: steps of at most 32 up to 512, at most 12 % waste above."""
        sizes = [1, 2, 4, 8, 16, 24, *range(32, 513, 32)]
        while sizes[-1] < self.max_num_tokens:
            sizes.append(int(sizes[-1] / 0.88) // 32 * 32)
        return (*(s for s in sizes if s < self.max_num_tokens), self.max_num_tokens)

    @cached_property
    def tuned_buckets(self) -> tuple[int, ...]:
        """Capture buckets at which tactics are timed: powers of two but 2, about every 64 between 128 and 512, where a
        step turns from bytes to operations, then about powers of four, and the last."""
        wanted = (size for size in _TUNED if size < self.max_num_tokens)
        near = {next(bucket for bucket in self.token_buckets if bucket >= size) for size in wanted}
        return tuple(sorted(near | {self.token_buckets[-1]}))

    def logit_buckets(self, tokens: int) -> tuple[int, ...]:
        """Logit rows that a step of so many tokens is captured for."""
        most = min(tokens, self.max_batch_size)
        return tuple(sorted({size for size in (1, 8, 64) if size < most} | {most}))

    def bucket(self, tokens: int, logits: int) -> tuple[int, int]:
        """The capture bucket (T, L) of a step. The one function that names it."""
        sizes = self.token_buckets
        size = sizes[bisect_left(sizes, tokens)]
        rows = self._logit_buckets[size]
        return size, rows[bisect_left(rows, logits)]

    @cached_property
    def _logit_buckets(self) -> dict[int, tuple[int, ...]]:
        """By token bucket; every step asks."""
        return {size: self.logit_buckets(size) for size in self.token_buckets}

    def tuned(self, size: int) -> int:
        """The tuned bucket whose tactics a size uses: the next one up, or the largest."""
        return next((t for t in self.tuned_buckets if t >= size), self.tuned_buckets[-1])

    def point(self, sizes: Sizes, points: Iterable[str]) -> str:
        """Of the named sizes at which a site was timed ("T64", "L8", "any"), the one whose ranking a bucket uses."""
        known = list(points)
        rows = next((n for n in self.logit_buckets(self.max_num_tokens) if n >= sizes["L"]), 0)
        names = ("any", f"T{self.tuned(sizes['T'])}", f"L{rows}")
        return next((name for name in names if name in known), known[-1])

    def sizes(self, tokens: int, logits: int) -> Sizes:
        """The run-time dimensions of bucket (T, L)."""
        sequences = min(tokens, self.max_batch_size)
        return {"T": tokens, "S": sequences, "L": logits, "M": self.table_width, "U": self.upload_size}

    @property
    def unpadded(self) -> dict[str, Sizes]:
        """The one bucket of a CPU, where a step runs at its own sizes: those at which it is timed stand for all."""
        return {"any": self.sizes(min(8, self.max_num_tokens), 1)}

    def buckets(self) -> dict[str, Sizes]:
        """Every capture bucket by name."""
        pairs = ((t, n) for t in self.token_buckets for n in self.logit_buckets(t))
        return {bucket_name(t, n): self.sizes(t, n) for t, n in pairs}

    def encoder_buckets(self) -> dict[str, Sizes]:
        """Those of an encoder's runs, which give no logits."""
        return {encoder_bucket(t): self.sizes(t, self.logit_buckets(t)[0]) for t in self.token_buckets}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _check_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} is a {type(value).__name__}; give an integer")
    if value < (least := _LEAST.get(name, 1)):
        raise OptionError(f"{name}={value} must be at least {least}")
