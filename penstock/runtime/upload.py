"""A step's upload: the rows of the batch, and every change to the slots, as one run of 32-bit numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.ir.ops.state import FIELDS, HEADER, REALS, ROW, SlotLayout
from penstock.runtime.kv.tables import Grown
from penstock.runtime.schedule.batch import Admission, Chunk, Decoders, Fork, StepPlan
from penstock.runtime.schedule.request import Request

Numbers = NDArray[np.int32]
Reals = NDArray[np.float32]
LENGTH = FIELDS.index("length")
NOTHING: Numbers = np.zeros(0, np.int32)
assert LENGTH == 0, "the length is the first field"


@dataclass(frozen=True, slots=True)
class Source:
    """What uploads take from a request: its prompt, and what its slot holds of it beside its block table."""

    prompt: Numbers
    slot: Numbers  # FIELDS, then rope frequencies, then how much an encoder reads, or is read whole
    controls: Numbers = field(default_factory=lambda: np.zeros(0, np.int32))  # the first numbers, as many as are used
    read: Numbers = field(default_factory=lambda: NOTHING)  # by an encoder, before all else


def slot_numbers(fields: Mapping[str, float], freqs: Sequence[float] = (), read: int | None = None) -> Numbers:
    """A slot's FIELDS before its first step: 0 where not given. `freqs`: rope frequencies where each request has its
    own. `read`: how many tokens an encoder reads, or see each other, where that is so. Floats travel as their bits.
    """
    numbers = np.zeros(len(FIELDS) + len(freqs) + (read is not None), np.int32)
    floats = numbers.view(np.float32)
    for name, value in fields.items():
        (floats if name in REALS else numbers)[FIELDS.index(name)] = value
    floats[len(FIELDS) : len(FIELDS) + len(freqs)] = freqs
    if read is not None:
        numbers[-1] = read
    return numbers


class Encoder:
    """Writes each plan's upload, as `ir.ops.state.prepare` reads it, into one buffer: it is good until the next.

    Decode rows are the same in every step of the same decoders, so they are written once, and a step of nothing else
    is the upload of the step before, unless a block table grows.
    """

    def __init__(self, layout: SlotLayout, size: int) -> None:
        """`size`: numbers of the largest upload."""
        self._layout = layout
        self._numbers = np.zeros(size, np.int32)
        self._decoders: Decoders | None = None  # whose rows the buffer holds
        self._steady: tuple[Decoders, Numbers] | None = None  # the last upload, where it held nothing but their rows
        self._count = np.arange(max(layout.history, layout.table, layout.freqs, layout.controls), dtype=np.int32)
        self._places: dict[int, tuple[Numbers, ...]] = {}  # by slot

    def encode(self, plan: StepPlan, source: Callable[[Request], Source]) -> Numbers:
        """The upload of a plan. `source` of each request that is admitted, in its prompt or in lockstep."""
        steady = not (plan.chunks or plan.grown or plan.retabled)
        if steady and self._steady is not None and self._steady[0] is plan.decoders:
            return self._steady[1]
        self._steady = None
        self._rows(plan)
        end = begin = HEADER + ROW * plan.num_rows
        for admission in plan.admitted:
            end = self._admission(end, admission, source(admission.request))
        for fork in plan.retabled:
            end = self._fork(end, fork, source(fork.request))
        if plan.grown:
            end = self._growth(end, plan.grown)
        for chunk in plan.chunks:
            end = self._prompt(end, chunk, source(chunk.request).prompt)
        self._numbers[:HEADER] = plan.num_rows, plan.num_tokens, plan.num_logits, (end - begin) // 2
        upload = self._numbers[:end]
        if steady:
            self._steady = (plan.decoders, upload)
        return upload

    def encode_sources(self, admitted: Sequence[Admission], source: Callable[[Request], Source]) -> Numbers:
        """The upload of an encoder's run over what it reads of these: whole rows, in slots of length 0, that give no
        logits. The step's own upload writes the slots anew."""
        self._steady = self._decoders = None
        rows = [(each.slot, len(source(each.request).read), 0) for each in admitted]
        self._numbers[HEADER : HEADER + ROW * len(rows)] = np.array(rows, np.int32).ravel()
        end = begin = HEADER + ROW * len(rows)
        for slot, request, tables, _ in admitted:
            own = source(request)
            end = self._history(self._slot(end, slot, 0, own.slot, NOTHING, tables), slot, 0, own.read)
        self._numbers[:HEADER] = len(rows), sum(count for _, count, _ in rows), 0, (end - begin) // 2
        return self._numbers[:end]

    def _rows(self, plan: StepPlan) -> None:
        count = len(plan.decoders.requests)
        rows = self._numbers[HEADER : HEADER + ROW * plan.num_rows].reshape(-1, ROW)
        if self._decoders is not plan.decoders:
            rows[:count, 0] = plan.decoders.slots
            rows[:count, 1:] = 1
            self._decoders = plan.decoders
        if plan.chunks:
            rows[count:] = [(chunk.slot, chunk.num_tokens, chunk.num_logits) for chunk in plan.chunks]

    def _admission(self, at: int, admission: Admission, source: Source) -> int:
        slot, request, tables, length = admission
        at = self._slot(at, slot, length, source.slot, source.controls, tables)
        if not request.looks_back:
            return at
        return self._history(at, slot, 0, _known(request, source.prompt, 0, length))

    def _fork(self, at: int, fork: Fork, source: Source) -> int:
        """A slot that held a beam of the same group already keeps all but its length and table."""
        fields, controls = (source.slot, source.controls) if fork.fresh else (source.slot[: LENGTH + 1], NOTHING)
        return self._slot(at, fork.slot, fork.length, fields, controls, fork.tables)

    def _slot(
        self, at: int, slot: int, length: int, fields: Numbers, controls: Numbers, tables: Sequence[Sequence[int]]
    ) -> int:
        """The first fields and frequencies, controls, and the entries of the block tables."""
        parts = [fields, controls, *[np.array(table, np.int32) for table in tables]]
        size = sum(map(len, parts))
        pairs, start = self._pairs(at, size), 0
        for part, its in zip(parts, self._slot_places(slot), strict=False):
            pairs[start : start + len(part), 0] = its[: len(part)]
            pairs[start : start + len(part), 1] = part
            start += len(part)
        pairs[LENGTH, 1] = length
        return at + 2 * size

    def _growth(self, at: int, grown: Sequence[Grown]) -> int:
        layout = self._layout
        size, starts = layout.table, [layout.table_of(0, group) for group in range(layout.tables)]
        at_table = [(starts[group] + slot * size + index, block) for slot, index, block, group in grown]
        self._pairs(at, len(grown))[:] = at_table
        return at + 2 * len(grown)

    def _slot_places(self, slot: int) -> tuple[Numbers, ...]:
        """Of fields and frequencies, of controls, and of each block table."""
        if slot not in self._places:
            layout = self._layout
            fields = np.array([layout.field(name) + slot for name in FIELDS], np.int32)
            freqs = self._count[: layout.freqs] + (layout.freqs_at + slot * layout.freqs)
            controls = self._count[: layout.controls] + (layout.controls_at + slot * layout.controls)
            encoder = self._count[: layout.encoder] + (layout.encoder_at + slot)
            tables = [self._count[: layout.table] + layout.table_of(slot, i) for i in range(layout.tables)]
            self._places[slot] = np.concatenate([fields, freqs, encoder]), controls, *tables
        return self._places[slot]

    def _prompt(self, at: int, chunk: Chunk, prompt: Numbers) -> int:
        """The chunk's tokens. One that scores has the token behind it as well: its last logits are asked about it."""
        end = chunk.start + chunk.num_tokens + chunk.request.scoring
        return self._history(at, chunk.slot, chunk.start, _known(chunk.request, prompt, chunk.start, end))

    def _history(self, at: int, slot: int, start: int, tokens: Numbers) -> int:
        layout, count = self._layout, len(tokens)
        pairs = self._pairs(at, count)
        np.add(self._count[:count], layout.history_at + slot * layout.history + start, out=pairs[:, 0])
        pairs[:, 1] = tokens
        return at + 2 * count

    def _pairs(self, at: int, count: int) -> Numbers:
        """Room for so many (index, value) pairs."""
        return self._numbers[at : at + 2 * count].reshape(-1, 2)


def _known(request: Request, prompt: Numbers, start: int, end: int) -> Numbers:
    """Of its tokens from `start` to `end` those there are: of the prompt, and of what was generated."""
    if end <= len(prompt) or not request.output:
        return prompt[start:end]
    first = len(prompt)
    known = request.output[max(start - first, 0) : end - first]
    return np.concatenate([prompt[start:end], np.array(known, np.int32)])
