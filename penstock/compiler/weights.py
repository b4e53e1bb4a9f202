"""Running weight expressions, one weight at a time, straight into a safetensors file.

Host memory holds a few weights at most: a checkpoint's tensors are memory-mapped, and what has been written is dropped.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Weight
from penstock.errors import CheckpointError
from penstock.ir.interpret import interpret
from penstock.ir.lazy import torch
from penstock.kernels.layouts import pack
from penstock.models.checkpoint import Checkpoint

WRITERS = 4  # weights being written while the next is computed
Source = Checkpoint | None


def write_weights(
    weights: Mapping[str, Weight], source: Source, path: Path, device: str, progress: Callable[[int], None]
) -> None:
    """Compute every weight and write it. `progress` is told the bytes of each. `device` makes random weights."""
    header, offsets, start = _header(weights)
    with path.open("wb") as file, ThreadPoolExecutor(WRITERS) as pool:
        file.write(header)
        file.truncate(start + sum(w.type.nbytes() for w in weights.values()))
        pending: deque[Future[int]] = deque()
        for name, weight in weights.items():
            while len(pending) >= WRITERS:
                progress(pending.popleft().result())
            pending.append(pool.submit(_write, file.fileno(), compute(weight, source, device), start + offsets[name]))
        while pending:
            progress(pending.popleft().result())


def compute(weight: Weight, source: Source, device: str = "cpu") -> Any:
    """One weight, packed in its layout, contiguous on the host."""
    with torch.no_grad(), torch.device(device if weight.expression.leaves("tensor") == () else "cpu"):
        feed = {n.name: _read(source, n.name, n.types[0].format.name) for n in weight.expression.leaves("tensor")}
        value = interpret(weight.expression, feed)["weight"]
    return pack(weight.layout, value).contiguous().cpu()


def _read(source: Source, name: str, format: str) -> Any:
    if source is None:
        raise CheckpointError(f"weight tensor {name!r} is needed and no checkpoint was given")
    return source.read(name, format)


def _write(file: int, tensor: Any, offset: int) -> int:
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done : done + (1 << 28)], offset + done)
    return len(data)


def _header(weights: Mapping[str, Weight]) -> tuple[bytes, dict[str, int], int]:
    """The file's header, each weight's offset behind it, and where the data starts: aligned to 64 bytes."""
    entries: dict[str, Any] = {}
    offsets: dict[str, int] = {}
    at = 0
    for name, weight in weights.items():
        size, type = weight.type.nbytes(), weight.type
        entries[name] = {"dtype": type.format.safetensors_dtype, "shape": type.shape, "data_offsets": [at, at + size]}
        offsets[name], at = at, at + size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text, offsets, 8 + len(text)
