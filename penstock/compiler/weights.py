"""Running weight expressions, one weight at a time, straight into a safetensors file.

Host memory holds a few weights at most: a checkpoint's tensors are memory-mapped, and what has been written is dropped.
"""

from __future__ import annotations

import json
import os
import queue
import struct
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock.engine.manifest import Weight
from penstock.errors import CheckpointError
from penstock.ir.graph import Type
from penstock.ir.interpret import interpret
from penstock.ir.lazy import torch
from penstock.kernels.layouts import pack
from penstock.models.checkpoint import Checkpoint

WRITERS = 4  # weights, or pieces of one, being written while the next is computed
PIECE = 32 << 20  # bytes that leave a GPU at once, through pinned memory: pageable memory is thirty times slower
Source = Checkpoint | None
Told = Callable[[int], None]
Lock = AbstractContextManager[Any]


def write_weights(weights: Mapping[str, Weight], source: Source, path: Path, device: str, progress: Told) -> None:
    """Compute every weight and write it. `progress` is told the bytes of each. `device` makes random weights."""
    with WeightFile(path, {name: w.type for name, w in weights.items()}) as file:
        file.write(weights, source, device, progress)


class WeightFile:
    """A safetensors file whose weights may come in any order, and in several calls. A context manager."""

    def __init__(self, path: Path, types: Mapping[str, Type]) -> None:
        header, self._offsets, self._start = _header(types)
        self._size = self._start + sum(t.nbytes() for t in types.values())
        self._path, self._begin = path, header
        self._stopped = False

    def __enter__(self) -> WeightFile:
        self._file = self._path.open("wb")
        self._file.write(self._begin)
        self._file.truncate(self._size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def stop(self) -> None:
        """Let a `write` in another thread end after the weight it is at."""
        self._stopped = True

    def write(
        self, weights: Mapping[str, Weight], source: Source, device: str, progress: Told, gpu: Lock | None = None
    ) -> None:
        """Compute these weights and write them. `gpu` is held while the GPU computes, never while writing."""
        with ThreadPoolExecutor(WRITERS) as pool:
            out = _Out(self._file.fileno(), pool)
            for name, weight in weights.items():
                if self._stopped:
                    return
                with gpu or nullcontext():
                    value = compute(weight, source, device)
                    if value.device.type == "cuda":
                        torch.cuda.current_stream().synchronize()
                out.put(value, self._start + self._offsets[name])
                progress(value.nbytes)
            out.finish()


class Writing:
    """A weights file that fills in the background while layouts are still being chosen. A context manager.

    `stage` is entered around each spell of writing; the rest is as for `write_weights`, and `gpu` as for WeightFile.
    """

    def __init__(
        self, path: Path, types: Mapping[str, Type], source: Source, device: str, progress: Told,
        stage: Callable[[], AbstractContextManager[None]], gpu: Lock | None,
    ) -> None:  # fmt: skip
        self._file = WeightFile(path, types)
        self._write = partial(self._file.write, source=source, device=device, progress=progress, gpu=gpu)
        self._stage = stage
        self._begun: set[str] = set()
        self._running: Future[None] | None = None

    def begin(self, weights: Mapping[str, Weight]) -> None:
        """Start writing these, whose layouts are final. Once."""
        self._begun.update(weights)
        self._running = self._thread.submit(self._spell, weights)

    def finish(self, weights: Mapping[str, Weight]) -> None:
        """Write all that have not been begun, and wait for those that have. Raises what writing those raised."""
        if self._running is not None:
            self._running.result()
        if rest := {name: w for name, w in weights.items() if name not in self._begun}:
            self._spell(rest)

    def _spell(self, weights: Mapping[str, Weight]) -> None:
        with self._stage():
            self._write(weights)

    def __enter__(self) -> Writing:
        self._file.__enter__()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-weights")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._file.stop()
        self._thread.shutdown()
        self._file.__exit__(kind, error, trace)


class _Out:
    """Writes tensors at their places while the next are computed; holds few of them at a time."""

    def __init__(self, file: int, pool: ThreadPoolExecutor) -> None:
        self._file, self._pool = file, pool
        self._pending: deque[Future[None]] = deque()
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()  # pinned buffers that nothing is written from
        self._buffers = 0

    def put(self, value: Any, offset: int) -> None:
        data = value.reshape(-1).view(torch.uint8)
        if value.device.type == "cpu":
            self._submit(_write, self._file, data, offset)
            return
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            buffer = self._buffer()
            buffer[: len(piece)].copy_(piece)
            self._submit(self._drain, buffer, len(piece), offset + start)

    def finish(self) -> None:
        """Wait until everything is written. Raises what a writer raised."""
        while self._pending:
            self._pending.popleft().result()

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        while len(self._pending) >= WRITERS:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(work, *arguments))

    def _buffer(self) -> Any:
        """One more than there are writers is enough for one to be free before the next is waited for."""
        if self._buffers <= WRITERS:
            self._buffers += 1
            return torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        return self._free.get()

    def _drain(self, buffer: Any, size: int, offset: int) -> None:
        try:
            _write(self._file, buffer[:size], offset)
        finally:
            self._free.put(buffer)


def _write(file: int, data: Any, offset: int) -> None:
    memory, done = memoryview(data.numpy()), 0
    while done < len(memory):
        done += os.pwrite(file, memory[done : done + (1 << 28)], offset + done)


def compute(weight: Weight, source: Source, device: str = "cpu") -> Any:
    """One weight, packed in its layout, contiguous: on the host, or where random numbers were made."""
    with torch.no_grad(), torch.device(device if weight.expression.leaves("tensor") == () else "cpu"):
        feed = {n.name: _read(source, n.name, n.types[0].format.name) for n in weight.expression.leaves("tensor")}
        value = interpret(weight.expression, feed)["weight"]
    return pack(weight.layout, value).contiguous()


def _read(source: Source, name: str, format: str) -> Any:
    if source is None:
        raise CheckpointError(f"weight tensor {name!r} is needed and no checkpoint was given")
    return source.read(name, format)


def _header(types: Mapping[str, Type]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, each weight's offset behind it, and where the data starts: aligned to 64 bytes."""
    entries: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    at = 0
    for name, type in types.items():
        size = type.nbytes()
        entries[name] = {"dtype": type.format.safetensors_dtype, "shape": type.shape, "data_offsets": [at, at + size]}
        offsets[name], at = at, at + size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text, offsets, 8 + len(text)
