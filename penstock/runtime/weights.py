"""An engine's weights: memory-mapped on a CPU; on a GPU read by several threads into pinned memory and copied over."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.memory import weight_offsets
from penstock.engine.store import weights_file
from penstock.errors import EngineCorruptError
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.kernels.launch import view

READERS = 8  # one thread copies out of the page cache at a fraction of what the bus carries
CHUNK = 16 << 20  # bytes read and copied at once
TURNS = 2  # buffers of a reader: one is read into while the other is copied from
LENGTH = struct.Struct("<Q")


def load_weights(engine: Engine, directory: Path) -> Mapping[str, Any]:
    """Weights by name, memory-mapped. Raises EngineCorruptError where the file does not hold what the manifest says."""
    from safetensors import SafetensorError, safe_open

    path = directory / weights_file()
    places(engine, path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in engine.weights}
    except (SafetensorError, OSError) as error:
        raise EngineCorruptError(f"{path} cannot be read ({error}); build the engine again") from None


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one weight within a chunk: where in the chunk, where in memory, how many."""

    source: int
    target: int
    size: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of the file, and where its bytes go."""

    offset: int
    size: int
    pieces: tuple[Piece, ...]


class Loading:
    """Weights on their way into `memory` (u8, weight_offsets' bytes). A context manager: leaving it waits for them.

    `weights` have their places at once, so that graphs can be captured over them, and their numbers after `wait`. Of
    the file no more than READERS x TURNS x CHUNK bytes are in pinned memory at a time. Raises EngineCorruptError at
    once where the file's header is not what the manifest says, and in `wait` where the file ends early.
    """

    def __init__(self, engine: Engine, directory: Path, memory: Any) -> None:
        self.path = directory / weights_file()
        self._memory = memory
        at = places(engine, self.path)
        targets, _ = weight_offsets(engine)
        self.weights = {name: view(memory, targets[name], w.type, {}) for name, w in engine.weights.items()}
        spans = sorted((at[name], targets[name], w.type.nbytes()) for name, w in engine.weights.items())
        parts = list(chunks(spans, CHUNK))
        self._chunks = iter(parts)
        self._lock, self._stop = threading.Lock(), False
        self._start, self.seconds = time.perf_counter(), 0.0  # until the last byte was in its place
        count = min(READERS, len(parts))
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="penstock-weights")
        self._readers: list[Future[None]] = [self._pool.submit(self._read) for _ in range(count)]

    def wait(self) -> None:
        """Until every byte is in its place. Raises what a reader raised."""
        self._pool.shutdown()
        for reader in self._readers:
            reader.result()

    def __enter__(self) -> Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = error is not None
        self._pool.shutdown()
        if error is None:
            self.wait()

    def _read(self) -> None:
        """One reader's share: the next chunk that nobody has taken, until there is none."""
        staging = _Staging(self._memory.device)
        try:
            with self.path.open("rb", buffering=0) as file:
                while (chunk := self._next()) is not None:
                    buffer = staging.turn()[: chunk.size]
                    _fill(file.fileno(), buffer, chunk, self.path)
                    staging.send(self._memory, buffer, chunk.pieces)
        except BaseException:
            self._stop = True  # the others need not go on
            raise
        finally:
            staging.close()
            with self._lock:
                self.seconds = max(self.seconds, time.perf_counter() - self._start)

    def _next(self) -> Chunk | None:
        with self._lock:
            return None if self._stop else next(self._chunks, None)


class _Staging:
    """A reader's buffers, pinned where they feed a GPU, and the stream on which they are copied."""

    def __init__(self, device: Any) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(TURNS)]
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._copied = [torch.cuda.Event() for _ in range(TURNS)] if self._cuda else []
        self._count = -1

    def turn(self) -> Any:
        """The next buffer, once nothing is copied from it any more."""
        self._count += 1
        if self._cuda:
            self._copied[self._count % TURNS].synchronize()
        return self._buffers[self._count % TURNS]

    def send(self, memory: Any, buffer: Any, pieces: Sequence[Piece]) -> None:
        with torch.cuda.stream(self._stream):  # no stream: does nothing
            for piece in pieces:
                target = memory[piece.target : piece.target + piece.size]
                target.copy_(buffer[piece.source : piece.source + piece.size], non_blocking=True)
            if self._cuda:
                self._copied[self._count % TURNS].record()

    def close(self) -> None:
        """Wait for the last copies."""
        if self._stream is not None:
            self._stream.synchronize()


def release_pinned() -> None:
    """Give back the pinned memory that torch keeps for the next one who asks."""
    if empty := getattr(torch._C, "_host_emptyCache", None):  # no public name for it in every version
        empty()


def chunks(spans: Sequence[tuple[int, int, int]], most: int) -> Iterator[Chunk]:
    """The file's spans (offset in the file, offset in memory, bytes), in its order, as chunks of at most so many bytes.

    Neighbours in the file share chunks; a span longer than a chunk takes several.
    """
    start = end = -1
    pieces: list[Piece] = []
    for offset, target, size in spans:
        while size:
            if pieces and (offset != end or end - start == most):
                yield Chunk(start, end - start, tuple(pieces))
                pieces = []
            if not pieces:
                start = end = offset
            part = min(size, most - (end - start))
            pieces.append(Piece(end - start, target, part))
            offset, target, size, end = offset + part, target + part, size - part, end + part
    if pieces:
        yield Chunk(start, end - start, tuple(pieces))


def _fill(file: int, buffer: Any, chunk: Chunk, path: Path) -> None:
    """Raises EngineCorruptError where the file ends within the chunk."""
    memory, done = memoryview(buffer.numpy()), 0
    while done < chunk.size:
        got = os.preadv(file, [memory[done:]], chunk.offset + done)
        if not got:
            raise EngineCorruptError(
                f"{path} ends at byte {chunk.offset + done}, {chunk.offset + chunk.size} are needed; "
                f"build the engine again"
            )
        done += got


def places(engine: Engine, path: Path) -> dict[str, int]:
    """Where in the file each weight starts.

    Raises EngineCorruptError for a file that is cut off, or whose header states other types, shapes or sizes than the
    manifest.
    """
    try:
        with path.open("rb") as file:
            (length,) = LENGTH.unpack(file.read(LENGTH.size))
            size, start = os.fstat(file.fileno()).st_size, LENGTH.size + length
            header = json.loads(file.read(length)) if start <= size else None
    except (OSError, struct.error, ValueError) as error:
        raise EngineCorruptError(f"{path} cannot be read ({error}); build the engine again") from None
    if not isinstance(header, dict):
        raise EngineCorruptError(f"{path} has no safetensors header within its {size} bytes; build the engine again")
    found: dict[str, int] = {}
    for name, weight in engine.weights.items():
        first = _first_byte(header.get(name), weight.type)
        if first is None:
            stated = str(header.get(name))[:100]
            raise EngineCorruptError(f"weight {name} in {path} is no {weight.type}: {stated}; build the engine again")
        end = start + first + weight.type.nbytes()
        if end > size:
            raise EngineCorruptError(f"{path} has {size} bytes and weight {name} ends at {end}; build the engine again")
        found[name] = start + first
    return found


def _first_byte(entry: Any, type: Type) -> int | None:
    """Of a header's entry, behind the header; None where it is not of that type."""
    try:
        first, last = entry["data_offsets"]
        right = (entry["dtype"], entry["shape"]) == (type.format.safetensors_dtype, list(type.shape))
        return int(first) if right and first >= 0 and last - first == type.nbytes() else None
    except (TypeError, KeyError, ValueError):
        return None
