"""The engine directory: written under a temporary name and renamed, read with every file checked for its size."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.engine import aside
from penstock.engine.manifest import Engine, from_json, to_json
from penstock.engine.timings import Timings, is_timing
from penstock.errors import EngineCorruptError, EngineError, ResourceError

MANIFEST, TIMING, GRAPH, KERNELS, FILES = "engine.json", "timing.json", "graph.txt", "kernels", "files.json"
LENGTH = struct.Struct("<Q")  # before a header of safetensors
ATTEMPTS = 8  # renames, where others take the same name at the same time


def is_engine(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def weights_file(rank: int = 0) -> str:
    return f"rank{rank}.safetensors"


def holds(target: Path, key: str) -> bool:
    """Whether the engine of this key is there in full. A damaged one is not, so that it is made again and replaced."""
    try:
        return is_engine(target) and load(target).source.get("key") == key
    except EngineError:
        return False


@contextmanager
def writing(target: Path, ours: bool = False) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its name when the block ends well, and vanishes otherwise.

    `ours`: the name is one of the cache's, where whatever is there may be replaced, but for an engine of the same key,
    which somebody else has made meanwhile. Raises ResourceError when the disk
    is full, EngineError when `target` exists and is no engine.
    """
    if not ours and target.exists() and not is_engine(target) and not _is_empty(target):
        raise EngineError(f"{target} exists and is no engine; name an empty or a new directory")
    with replacing(target, "writing the engine", _is_there if ours else None) as part:
        yield part
        (part / FILES).write_text(json.dumps(_inventory(part), indent=1))


@contextmanager
def replacing(target: Path, doing: str, keep: Callable[[Path, Path], bool] | None = None) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its name when the block ends well, and vanishes otherwise.

    What was there stays until then, and comes back where the last rename fails; what killed processes left beside it is
    removed. `keep`, given both at the end, says whether what is there stays for good. Raises ResourceError, saying what
    it was `doing`, when the disk is full.
    """
    part, old = aside.names(target)
    try:
        aside.sweep(target)
        part.mkdir(parents=True)
        yield part
        if keep is None or not keep(part, target):
            _take_place(part, target, old)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left under {target.parent} while {doing}; free some, or name another place"
            ) from None
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _is_there(part: Path, target: Path) -> bool:
    """Whether somebody else made the same engine meanwhile, and may have opened it already."""
    key = _json(part / MANIFEST).get("source", {}).get("key") if is_engine(part) else None
    return key is not None and holds(target, key)


def _take_place(part: Path, target: Path, old: Path) -> None:
    """The fresh directory gets the name, whatever others do with that name meanwhile: the last to come has it."""
    for attempt in range(ATTEMPTS):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # another one's, which took the name since
            with suppress(FileNotFoundError):
                target.rename(old)  # aside, so that a crash between two renames loses nothing
        try:
            part.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == ATTEMPTS - 1:
                raise
        else:
            shutil.rmtree(old, ignore_errors=True)  # at once, or it could come back while another one takes the name
            return


def save(engine: Engine, directory: Path) -> None:
    """Write engine.json."""
    (directory / MANIFEST).write_text(json.dumps(to_json(engine)))


def load(directory: Path) -> Engine:
    """The manifest, after checking that every file is there in full. Weights and kernels are not read."""
    if not is_engine(directory):
        raise EngineError(f"{directory} is no engine directory (it has no {MANIFEST}); make one with `penstock build`")
    check(directory)
    return replace(from_json(_json(directory / MANIFEST)), directory=directory)


def timing(directory: Path) -> Timings:
    """What every candidate took, by site and point, or why it was refused. Raises EngineCorruptError."""
    path = directory / TIMING
    data = _json(path)
    if bad := next((site for site, entry in data.items() if not is_timing(entry)), None):
        raise EngineCorruptError(f"{path} does not say what {bad!r} took; build the engine again")
    return data


def drawing(directory: Path) -> str:
    """The graphs as people read them. Raises EngineCorruptError."""
    return _text(directory / GRAPH)


def check(directory: Path) -> None:
    """Every file has the size that was written, and all but the weights' data the content."""
    inventory = _json(directory / FILES)
    if MANIFEST not in inventory:
        raise EngineCorruptError(f"{directory / FILES} does not list {MANIFEST}; build the engine again")
    for name, facts in inventory.items():
        path = directory / name
        if not isinstance(facts, dict) or not {"size", "fingerprint"} <= facts.keys():
            raise EngineCorruptError(f"{directory / FILES} does not say what {name} holds; build the engine again")
        size = path.stat().st_size if path.is_file() else -1
        if size != facts["size"]:
            found = "missing" if size < 0 else f"{size} bytes"
            raise EngineCorruptError(f"{path} is {found}, {facts['size']} bytes were written; build the engine again")
        if fingerprint(path) != facts["fingerprint"]:
            raise EngineCorruptError(f"{path} was changed after it was written; build the engine again")


def copy(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files below `source` to the same places below `target`."""
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def fingerprint(path: Path) -> str:
    """A hash that is quick on files of any size: all of the file, of safetensors the header.

    Raises EngineCorruptError where safetensors are shorter than the header that they announce.
    """
    if path.suffix != ".safetensors":
        return _sha256(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(LENGTH.size)
        (length,) = LENGTH.unpack(start) if len(start) == LENGTH.size else (size,)
        if length > size - LENGTH.size:
            raise EngineCorruptError(
                f"{path} of {size} bytes cannot hold a header of {length} bytes; build the engine again"
            )
        return hashlib.sha256(file.read(length)).hexdigest()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _inventory(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != FILES)
    return {str(p.relative_to(directory)): {"size": p.stat().st_size, "fingerprint": fingerprint(p)} for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise EngineCorruptError(f"{path} cannot be read ({error}); build the engine again") from None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise EngineCorruptError(f"{path} cannot be read ({error}); build the engine again") from None
    if not isinstance(data, dict):
        raise EngineCorruptError(f"{path} holds no JSON object; build the engine again")
    return data
