"""The loader that feeds a GPU, on the CPU's memory: every byte in its place, and no file taken on trust."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.memory import ALIGN, weight_offsets
from penstock.errors import EngineCorruptError
from penstock.runtime import weights as module
from penstock.runtime.weights import Chunk, Loading, chunks, load_weights


def memory_of(engine: Engine) -> torch.Tensor:
    return torch.full((weight_offsets(engine)[1],), 0xA5, dtype=torch.uint8)


@pytest.mark.parametrize(("readers", "chunk"), [(1, 1 << 20), (3, 1000), (8, 4097)])
def test_every_weight_arrives(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, readers: int, chunk: int) -> None:
    monkeypatch.setattr(module, "READERS", readers)
    monkeypatch.setattr(module, "CHUNK", chunk)
    engine = store.load(tiny_engine)
    wanted = load_file(tiny_engine / store.weights_file())
    with Loading(engine, tiny_engine, memory_of(engine)) as loading:
        weights = loading.weights  # the places are known at once
        loading.wait()
    assert weights.keys() == wanted.keys() == engine.weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, wanted[name]) and weight.data_ptr() % 64 == 0, name
    assert loading.seconds > 0
    mapped = load_weights(engine, tiny_engine)
    assert all(torch.equal(mapped[name], wanted[name]) for name in wanted)


def test_no_more_is_held_than_the_buffers(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the file: a reader has TURNS buffers of CHUNK bytes, and takes no more at once."""
    monkeypatch.setattr(module, "READERS", 2)
    monkeypatch.setattr(module, "CHUNK", 1000)
    made: list[int] = []
    plain = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *a, **k: made.append(a[0]) or plain(*a, **k))
    engine = store.load(tiny_engine)
    with Loading(engine, tiny_engine, memory_of(engine)) as loading:
        loading.wait()
    assert made and sum(made) <= 2 * module.TURNS * 1000


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 70)), min_size=1, max_size=20), st.integers(1, 50))
def test_chunks_hold_every_byte_once(gaps: Sequence[tuple[int, int]], most: int) -> None:
    spans, at, target = [], 8, 0
    for gap, size in gaps:
        spans.append((at + gap, target, size))
        at, target = at + gap + size, target + -(-size // ALIGN) * ALIGN
    file = torch.arange(at, dtype=torch.int32)
    got = torch.full((target,), -1, dtype=torch.int32)
    for chunk in chunks(spans, most):
        assert 0 < chunk.size <= most
        buffer = file[chunk.offset : chunk.offset + chunk.size]
        assert sum(p.size for p in chunk.pieces) == chunk.size
        for p in chunk.pieces:
            assert (got[p.target : p.target + p.size] == -1).all()
            got[p.target : p.target + p.size] = buffer[p.source : p.source + p.size]
    for offset, place, size in spans:
        assert got[place : place + size].tolist() == list(range(offset, offset + size))
    assert int((got >= 0).sum()) == sum(size for _, _, size in spans)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data, header = path.read_bytes(), header_of(path)
    start = 8 + int.from_bytes(data[:8], "little")
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def cut(path: Path, size: int) -> None:
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


DAMAGE: list[tuple[str, Callable[[Path, str], object], str]] = [
    ("cut in the data", lambda p, n: cut(p, -1), "ends at"),
    ("cut in the header", lambda p, n: cut(p, 40), "no safetensors header"),
    ("cut in the length", lambda p, n: cut(p, 5), "cannot be read"),
    ("missing", lambda p, n: p.unlink(), "cannot be read"),
    ("no JSON", lambda p, n: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "cannot be read"),
    ("a list", lambda p, n: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "no safetensors header"),
    ("a weight less", lambda p, n: rewrite(p, lambda h: h.pop(n)), "is no f32"),
    ("another type", lambda p, n: rewrite(p, lambda h: h[n].update(dtype="I32")), "is no f32"),
    ("another shape", lambda p, n: rewrite(p, lambda h: h[n].update(shape=[1])), "is no f32"),
    ("before the data", lambda p, n: rewrite(p, lambda h: h[n].update(data_offsets=[-4, -4])), "is no f32"),
    ("no offsets", lambda p, n: rewrite(p, lambda h: h.update({n: 3})), "is no f32"),
]


@pytest.mark.parametrize(("damage", "said"), [x[1:] for x in DAMAGE], ids=[x[0] for x in DAMAGE])
def test_a_damaged_file_is_an_error_that_names_it(
    tiny_engine: Path, tmp_path: Path, damage: Callable[[Path, str], object], said: str
) -> None:
    engine, own = store.load(tiny_engine), shutil.copytree(tiny_engine, tmp_path / "engine")
    damage(own / store.weights_file(), list(engine.weights)[-1])
    for load in (lambda: Loading(engine, own, memory_of(engine)), lambda: load_weights(engine, own)):
        with pytest.raises(EngineCorruptError, match=said) as caught:
            load()
        assert "build the engine again" in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, own = store.load(tiny_engine), shutil.copytree(tiny_engine, tmp_path / "engine")
    plain = module._fill

    def shrunk(file: int, buffer: Any, chunk: Chunk, path: Path) -> None:
        cut(path, 64)
        plain(file, buffer, chunk, path)

    monkeypatch.setattr(module, "_fill", shrunk)
    with pytest.raises(EngineCorruptError, match="ends at byte"), Loading(engine, own, memory_of(engine)) as loading:
        loading.wait()


def test_a_failure_meanwhile_ends_the_readers(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the engine fails while weights are on their way: the readers stop, and the error is the first."""
    monkeypatch.setattr(module, "CHUNK", 64)
    engine = store.load(tiny_engine)
    with pytest.raises(ZeroDivisionError), Loading(engine, tiny_engine, memory_of(engine)) as loading:
        raise ZeroDivisionError
    assert all(reader.done() for reader in loading._readers)
