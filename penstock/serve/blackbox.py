"""What the engine process did last, in a small file that both processes map: it outlives any death.

No prompts and no token ids: of each row the request's id, its tokens in the step, and its context behind it. Little
endian: MAGIC, slots u32; an id of ID bytes for each slot, zeros behind it; two steps in turn, each a _STEP (number 0:
being written), the decoding rows' slots and starts, i32[slots] each, and the chunks' slot, start and tokens,
i32[slots, 3]. Decoding rows stay as they are while `rounds` counts, which is why a step costs some microseconds.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from penstock.runtime.schedule.batch import Decoders, StepPlan
    from penstock.runtime.schedule.request import Request

MAGIC: Final = b"penstock"
ID: Final = 64  # bytes kept of a request's id
_HEAD: Final = struct.Struct("<8sI4x")
_STEP: Final = struct.Struct("<qdIIII")  # number from 1, when launched, tokens, decoding rows, chunks, rounds
_CHUNK: Final = struct.Struct("<3i")


class _Layout:
    """Where things lie, for so many slots."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.starts = _STEP.size + 4 * slots
        self.chunks = self.starts + 4 * slots
        self._step = self.chunks + _CHUNK.size * slots
        self.size = self.step(2)

    def id(self, slot: int) -> int:
        return _HEAD.size + ID * slot

    def step(self, turn: int) -> int:
        return self.id(self.slots) + self._step * turn


class BlackBox:
    """The file as its writer has it: `record` before each launch."""

    def __init__(self, path: Path, slots: int) -> None:
        self._layout = _Layout(slots)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(file, self._layout.size)
        self._map = mmap.mmap(file, self._layout.size)
        os.close(file)
        _HEAD.pack_into(self._map, 0, MAGIC, slots)
        self._decoders: list[Decoders | None] = [None, None]  # whose rows each step's place holds

    def record(self, plan: StepPlan) -> None:
        turn, layout = plan.step_id % 2, self._layout
        at = layout.step(turn)
        decoders, chunks = plan.decoders, plan.chunks
        _STEP.pack_into(self._map, at, 0, 0.0, 0, 0, 0, 0)
        for admission in plan.admitted:
            self._name(admission.slot, admission.request)
        for fork in plan.retabled:
            self._name(fork.slot, fork.request)
        if decoders is not self._decoders[turn]:
            self._decoders[turn] = decoders
            numbers = struct.Struct(f"<{len(decoders.slots)}i")
            numbers.pack_into(self._map, at + _STEP.size, *decoders.slots)
            numbers.pack_into(self._map, at + layout.starts, *decoders.starts)
        for index, chunk in enumerate(chunks):
            place = at + layout.chunks + _CHUNK.size * index
            _CHUNK.pack_into(self._map, place, chunk.slot, chunk.start, chunk.num_tokens)
        counts = plan.num_tokens, len(decoders.slots), len(chunks), plan.rounds
        _STEP.pack_into(self._map, at, plan.step_id + 1, monotonic(), *counts)

    def _name(self, slot: int, request: Request) -> None:
        name = request.id.encode(errors="replace")[:ID]
        at = self._layout.id(slot)
        self._map[at : at + ID] = name.ljust(ID, b"\0")


def read_box(path: Path) -> list[dict[str, Any]]:
    """The newest step and the one before it, as far as there are; empty where the file is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    if len(data) < _HEAD.size or not data.startswith(MAGIC):
        return []
    layout = _Layout(_HEAD.unpack_from(data)[1])
    if len(data) != layout.size:
        return []
    steps = [step for turn in (0, 1) for step in _read_step(data, layout, layout.step(turn))]
    return sorted(steps, key=lambda step: -int(step["step"]))


def _read_step(data: bytes, layout: _Layout, at: int) -> Iterator[dict[str, Any]]:
    number, launched, tokens, decoding, chunks, rounds = _STEP.unpack_from(data, at)
    if number <= 0 or decoding + chunks > layout.slots:
        return
    slots = struct.unpack_from(f"<{decoding}i", data, at + _STEP.size)
    starts = struct.unpack_from(f"<{decoding}i", data, at + layout.starts)
    rows = [(slot, start + rounds, 1) for slot, start in zip(slots, starts, strict=True)]
    rows += [_CHUNK.unpack_from(data, at + layout.chunks + _CHUNK.size * i) for i in range(chunks)]
    yield {
        "step": number, "launched": launched, "tokens": tokens,
        "rows": [{"request": _name(data, layout, slot), "tokens": n, "context": start + n} for slot, start, n in rows],
    }  # fmt: skip


def _name(data: bytes, layout: _Layout, slot: int) -> str:
    if not 0 <= slot < layout.slots:
        return ""
    return data[layout.id(slot) : layout.id(slot) + ID].rstrip(b"\0").decode(errors="replace")
