"""The files of a model that was trained on several ranks, under one set of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from penstock.errors import CheckpointError
from penstock.formats import FLOATS
from penstock.models.checkpoint import Checkpoint, TensorInfo, read_header

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?|tp_rank_(\d+)_pp_rank_(\d+)")
_PICKLED = ("*.nemo", "*.pt", "*.ckpt", "*.bin", "*.pth", "*.distcp", "*/*.pt", "*/*.ckpt", "*/*.distcp")
RESAVE = (
    "where you trust the file, load it once with torch.load, and save each rank's tensors by their dotted names with "
    "safetensors.torch.save_file as mp_rank_TT_PPP/model.safetensors (tensor rank, pipeline rank), and the settings "
    "beside them (megatron: args.json; nemo: model_config.yaml)"
)
# From Megatron core, Megatron-LM before it, and NeMo around either, to one spelling.
_SPELLINGS = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(model|module|language_model)\.", ""),
        (r"^(model|module|language_model)\.", ""),
        (r"^(model|module|language_model)\.", ""),
        (r"^(encoder|transformer)\.", "decoder."),
        (r"(\.layers\.\d+)\.attention\.", r"\1.self_attention."),
        (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
        (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
        (r"\.(self_attention\.linear_qkv\.layer_norm_|input_layernorm\.|input_norm\.)", ".mixer_norm."),
        (r"\.(mlp\.linear_fc1\.layer_norm_|pre_mlp_layernorm\.|post_attention_(layer)?norm\.)", ".feedforward_norm."),
        (r"^decoder\.final_layernorm\.", "decoder.final_norm."),
        (r"^(word_embeddings_for_head|word_embeddings)\.", "output_layer."),
    )
)
_NO_WEIGHTS = re.compile(r".*(_extra_state\d*|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,9})\.")
MAX_RANKS = 1024  # far beyond any training run's


@dataclass(frozen=True)
class Shards:
    """`checkpoint` holds each tensor as `tp0/pp0/` and its name in one spelling, layers numbered through the model.

    stages: how many layers each pipeline stage has. directories: where settings may lie, the innermost first.
    """

    checkpoint: Checkpoint
    tp: int
    stages: tuple[int, ...]
    directories: tuple[Path, ...]

    @property
    def pp(self) -> int:
        return len(self.stages)

    def stage_of(self, layer: int) -> int:
        return next(stage for stage in range(self.pp) if layer < sum(self.stages[: stage + 1]))

    def rows(self, pp: int, name: str) -> int:
        """Of the first tensor rank's share; 0 for what is no matrix."""
        return (*self.checkpoint.info(shard_name(0, pp, name)).shape, 0)[0]

    def has(self, pp: int, name: str) -> bool:
        return shard_name(0, pp, name) in self.checkpoint.tensors

    def stored_format(self) -> str:
        """The format of the embedding; norms are often wider."""
        stored = self.checkpoint.info(shard_name(0, 0, "embedding.word_embeddings.weight")).dtype
        found = next((f.name for f in FLOATS if f.safetensors_dtype == stored), None)
        if found is None:
            raise CheckpointError(f"the shards hold {stored}, expected F32, F16 or BF16; save them as one of these")
        return found

    @classmethod
    def open(cls, path: Path) -> Shards:
        """Read the headers. Raises CheckpointError for ranks missing, doubled, or pickled."""
        directory = _iteration(path)
        files = _files(directory)
        tp, pp = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
        if max(tp, pp) > MAX_RANKS:
            raise CheckpointError(f"{directory} has a file of tensor rank {tp - 1}, pipeline rank {pp - 1}; at most "
                                  f"{MAX_RANKS} ranks of a kind are read: correct its name")  # fmt: skip
        if missing := [(t, p) for p in range(pp) for t in range(tp) if (t, p) not in files]:
            raise CheckpointError(f"{directory} lacks the file of tensor rank {missing[0][0]}, pipeline rank "
                                  f"{missing[0][1]}, of {tp} x {pp}; fetch it too")  # fmt: skip
        named = {rank: _named(file) for rank, file in files.items()}
        first = _first_layers(directory, named, pp)
        tensors = {
            shard_name(t, p, _numbered(name, first[p])): info
            for (t, p), found in named.items() for name, info in found.items()
        }  # fmt: skip
        stages = tuple(len(_layers(named[0, p])) for p in range(pp))
        return cls(Checkpoint(directory, tensors), tp, stages, tuple(dict.fromkeys((directory, path))))


def shard_name(tp: int, pp: int, name: str) -> str:
    return f"tp{tp}/pp{pp}/{name}"


def _iteration(path: Path) -> Path:
    if not path.is_dir():
        kind = "a pickled file, which runs code when read" if path.is_file() else "no directory"
        raise CheckpointError(f"{path} is {kind}; {RESAVE}")
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return path
    said = tracker.read_text("utf-8", "replace").strip()
    inner = path / (f"iter_{int(said):07d}" if said.isascii() and said.isdigit() and len(said) < 10 else "release")
    if not inner.is_dir():
        raise CheckpointError(
            f"{tracker} says {said[:20]!r}, but there is no {inner.name} beside it; name its directory"
        )
    return inner


def _files(directory: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, pipeline rank) -> file: a folder for each rank with one file in it, files named so, or one file."""
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(directory.iterdir()):
        match = _RANK.fullmatch(entry.name.removesuffix(".safetensors"))
        if match is None or (entry.is_file() and entry.suffix != ".safetensors"):
            continue
        numbers = [int(number) for number in match.groups() if number is not None]
        rank = (numbers[0], numbers[1] if len(numbers) > 1 else 0)
        if rank in found:
            raise CheckpointError(f"{found[rank]} and {entry} are of one rank; remove one of them")
        found[rank] = entry if entry.is_file() else _only(entry)
    return found or {(0, 0): _only(directory)}


def _only(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    what = f"pickled weights only ({pickled[0]}), which run code when read" if pickled else "no safetensors file"
    what = f"{len(files)} safetensors files, of which none says its rank" if files else what
    raise CheckpointError(f"{folder} holds {what}; {RESAVE}")


def _named(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by their one spelling."""
    found: dict[str, TensorInfo] = {}
    for stored, info in read_header(file):
        if _NO_WEIGHTS.fullmatch(stored):
            continue
        name = stored
        for pattern, ours in _SPELLINGS:
            name = pattern.sub(ours, name)
        if name in found:
            raise CheckpointError(f"{file}: {found[name].stored} and {stored} are one tensor; remove one of them")
        found[name] = replace(info, stored=stored)
    return found


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := _LAYER.match(name))})


def _first_layers(directory: Path, named: Mapping[tuple[int, int], Mapping[str, TensorInfo]], pp: int) -> list[int]:
    """What to add to a stage's layer numbers: each stage counts from 0, or all count through."""
    shifts, before = [], 0
    for stage in range(pp):
        numbers = _layers(named[0, stage])
        first = numbers[0] if numbers else 0
        if not numbers or first not in (0, before) or numbers != list(range(first, first + len(numbers))):
            raise CheckpointError(
                f"{directory}: pipeline rank {stage} has layers {numbers[:5]}...; they must follow each other from 0 "
                f"or {before} (interleaved stages are not implemented: save the model with plain ones)"
            )
        shifts.append(before - first)
        before += len(numbers)
    return shifts


def _numbered(name: str, shift: int) -> str:
    return _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + shift}.", name)
