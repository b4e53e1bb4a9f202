"""Safetensors checkpoints: names and shapes from the headers alone, tensors memory-mapped, one at a time."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from penstock.errors import CheckpointError
from penstock.formats import FLOATS, known, parse
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.models.binding import Binding, declared
from penstock.text.files import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 << 20  # bytes; the library's own limit
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
READ = frozenset(f.safetensors_dtype for f in FLOATS)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header states it."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16"
    nbytes: int
    file: Path
    stored: str = ""  # its name in the file, where the checkpoint calls it something else


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory. Nothing but headers is read until a tensor is asked for."""

    directory: Path
    tensors: Mapping[str, TensorInfo]
    _mapped: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """A single `model.safetensors`, or the shards that `model.safetensors.index.json` names.

        Raises CheckpointError where there are none, a shard is missing, or a file is truncated or no safetensors file.
        """
        directory = Path(directory)
        tensors: dict[str, TensorInfo] = {}
        for file in _files(directory):
            for name, info in read_header(file):
                if name in tensors:
                    both = f"{tensors[name].file.name} and in {file.name}"
                    raise CheckpointError(f"{name} is in {both}; remove one of them")
                tensors[name] = info
        _check_index(directory, tensors)
        return cls(directory, tensors)

    @classmethod
    def open_ranks(cls, directory: str | Path, count: int) -> Checkpoint:
        """The `count` files of a checkpoint dealt over ranks; a tensor's name is `rank0/` and its name in the file.

        Raises CheckpointError where there are fewer or more, or a file is truncated or no safetensors file.
        """
        directory = Path(directory)
        wanted = [f"rank{i}.safetensors" for i in range(count)]
        found = {path.name for path in directory.glob("rank*.safetensors")}
        if missing := [name for name in wanted if name not in found]:
            raise CheckpointError(f"{directory} lacks {_some(missing)} of {count} ranks; convert the model again")
        if extra := sorted(found - set(wanted)):
            raise CheckpointError(f"{directory} holds {_some(extra)}, but config.json says {count} ranks; remove them")
        tensors = {
            f"{file.removesuffix('.safetensors')}/{name}": replace(info, stored=name)
            for file in wanted
            for name, info in read_header(directory / file)
        }
        return cls(directory, tensors)

    def renamed(self, spellings: Iterable[tuple[str, str]]) -> Checkpoint:
        """The same tensors by other names: each (pattern, replacement) in order.

        Raises CheckpointError where two tensors come to one name.
        """
        tensors: dict[str, TensorInfo] = {}
        for stored, info in self.tensors.items():
            name = stored
            for pattern, replacement in spellings:
                name = re.sub(pattern, replacement, name)
            if name in tensors:
                both = f"{tensors[name].stored or name!r} and {stored!r}"
                raise CheckpointError(f"{self.directory} holds {both}, two spellings of {name!r}; remove one of them")
            tensors[name] = info if name == stored else replace(info, stored=info.stored or stored)
        return replace(self, tensors=tensors)

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointError for a tensor that is not there."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name!r}; it holds {_some(self.tensors)}")
        return self.tensors[name]

    def read(self, name: str, format: str | None = None) -> Any:
        """The whole tensor, memory-mapped; converted (and so copied) where `format` is not the stored one."""
        return _converted(self._file(name).get_tensor(self.info(name).stored or name), format)

    def read_slice(self, name: str, dim: int, start: int, stop: int, format: str | None = None) -> Any:
        """Indices start to stop along `dim`, reading no other pages than theirs."""
        index = (slice(None),) * dim + (slice(start, stop),)
        return _converted(self._file(name).get_slice(self.info(name).stored or name)[index], format)

    def check(self, binding: Binding, ignored: Iterable[str] = ()) -> None:
        """Prove that the binding and the checkpoint match: nothing missing, of another shape, or left over.

        `ignored` are regular expressions of names that a checkpoint may hold beside its weights. Raises CheckpointError
        naming up to five tensors.
        """
        wanted = declared(binding)
        if missing := sorted(wanted.keys() - self.tensors.keys()):
            raise CheckpointError(f"{self.directory} lacks {_some(missing)}, which the config implies; fetch it again")
        found = ((name, self.tensors[name], type) for name, type in wanted.items())
        if wrong := [_mismatch(*each) for each in found if not _fits(*each[1:])]:
            raise CheckpointError(f"{self.directory}: {_some(wrong)}; config.json and the weights are of two models")
        patterns = [re.compile(p) for p in ignored]
        left = sorted(n for n in self.tensors.keys() - wanted.keys() if not any(p.fullmatch(n) for p in patterns))
        if left:
            raise CheckpointError(
                f"{self.directory} holds {_some(left)}, which this family does not read: the model would not be the "
                f"one that was trained; use a checkpoint of the plain architecture"
            )

    def _file(self, name: str) -> Any:
        path = self.info(name).file
        if path not in self._mapped:
            self._mapped[path] = _mapped(path)
        return self._mapped[path]


def read_header(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    """(name, info) of every tensor of one safetensors file: an 8-byte length, JSON, then the data.

    Raises CheckpointError where the header cannot be read, or the file is not as long as it says.
    """
    _check_path(file)
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = 8 + _header_length(stream.read(8), size, file)
            header = parse_json(stream.read(start - 8))
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}); fetch the file again") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is no JSON object; fetch the file again")
    _check_metadata(header.pop("__metadata__", {}), file)
    widths = {f.safetensors_dtype: f.bytes for f in map(parse, known())}
    infos = [(name, _info(name, entry, file, widths)) for name, entry in header.items()]
    needed = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != needed:
        raise CheckpointError(f"{file} has {size} bytes, its header says {needed}: truncated; fetch the file again")
    yield from infos


def _header_length(prefix: bytes, size: int, file: Path) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{file} has {size} bytes and no safetensors header; fetch the file again")
    length = int(struct.unpack("<Q", prefix)[0])
    if length > min(size - 8, MAX_HEADER):
        hint = "it may be a Git LFS pointer" if size < 1024 else "it is truncated, or no safetensors file"
        raise CheckpointError(f"{file} states a header of {length} bytes in {size}: {hint}; fetch the file again")
    return length


def _info(name: str, entry: Any, file: Path, widths: Mapping[str, int]) -> TensorInfo:
    found = (
        (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (0, 0, 0)
    )
    dtype, shape, offsets = found
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{file}: the header's entry of {name!r} is malformed; fetch the file again")
    info = TensorInfo(tuple(shape), dtype, offsets[1] - offsets[0], file)
    if info.dtype in widths and info.nbytes != prod(info.shape) * widths[info.dtype]:
        what = f"{info.dtype}{list(info.shape)}"
        raise CheckpointError(f"{file}: {name!r} has {info.nbytes} bytes for {what}; fetch the file again")
    return info


def _counts(value: object) -> TypeGuard[list[int]]:
    """A list of integers that a file's header may hold."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _check_metadata(value: object, file: Path) -> None:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{file}: the header's __metadata__ is no object of texts; fetch the file again")


def _check_path(file: Path) -> None:
    """The library that maps the file takes paths of UTF-8 alone; better known before a build than after it."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{str(file)!r} is no path of UTF-8, which safetensors needs; rename it") from None


def _mapped(file: Path) -> Any:
    """The library's view of a file. It checks more than we do: that the tensors touch, for one."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(f"{file} cannot be mapped ({said}); fetch the file again") from None


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; name the one that holds config.json and *.safetensors")
    if (directory / INDEX).exists():
        files = sorted(directory / name for name in set(_index(directory).values()))
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{directory} lacks {_some(missing)}, named by {INDEX}; fetch the missing shards")
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({_some(pickled)}), which run code when read; load them once "
            f"where you trust them and re-save: transformers' model.save_pretrained(dir, safe_serialization=True)"
        )
    raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}; name a directory with safetensors weights")


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> shard, a plain file name beside the index."""
    try:
        weight_map = parse_json((directory / INDEX).read_text("utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / INDEX} cannot be read ({error!r}); fetch the file again") from None
    if outside := [name for name in dict.fromkeys(names.values()) if Path(name).name != name]:
        raise CheckpointError(f"{directory / INDEX} names {outside[0]!r}, which is not a file beside it")
    return names


def _check_index(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if (directory / INDEX).exists():
        index = _index(directory)
        files = {shard: directory / shard for shard in set(index.values())}
        wrong = [n for n, shard in index.items() if n not in tensors or tensors[n].file != files[shard]]
        if wrong:
            raise CheckpointError(f"{directory}: {_some(wrong)} not in the shard that {INDEX} names; fetch it again")


def _fits(info: TensorInfo, type: Type) -> bool:
    """The stored tensor has the shape, and is a dense float that can be converted; or as is, where it is no float."""
    known = READ if type.format.is_float else (type.format.safetensors_dtype,)
    return bool(info.shape == type.shape and info.dtype in known)


def _mismatch(name: str, info: TensorInfo, type: Type) -> str:
    *others, last = [f.safetensors_dtype for f in (FLOATS if type.format.is_float else (type.format,))]
    expected = f"{', '.join(others)} or {last}" if others else last
    return f"{name} is {info.dtype}{list(info.shape)}, expected {expected} of {list(type.shape)}"


def _converted(tensor: Any, format: str | None) -> Any:
    return tensor if format is None else tensor.to(getattr(torch, parse(format).torch_dtype))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
