"""Checkpoints of Megatron-LM and NeMo as Hugging Face ones: config, and each tensor as an expression over shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import CheckpointError
from penstock.ir import Value
from penstock.models.binding import declared
from penstock.models.checkpoint import Checkpoint
from penstock.models.foreign.facts import hf_config, read_facts
from penstock.models.foreign.settings import read_settings
from penstock.models.foreign.shards import Shards
from penstock.models.foreign.tensors import expressions
from penstock.models.registry import read_spec, weights

FORMATS = ("megatron", "nemo")


@dataclass(frozen=True)
class Foreign:
    """A Hugging Face config and its tensors, each an expression over the tensors of `checkpoint`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Value]
    checkpoint: Checkpoint


def open_foreign(path: Path, model_format: str, dtype: str | None = None) -> Foreign:
    """`dtype`: bf16, f16 or f32, else the stored one. Everything is proved from the headers, both ways: each tensor of
    the shards is read, or is a copy of one that is; and each tensor is one that the family of the config reads.

    Raises CheckpointError, ConfigError, UnsupportedError or UnsupportedArchitectureError.
    """
    shards = Shards.open(path)
    facts = read_facts(read_settings(shards.directories, model_format), model_format, shards)
    dtype = dtype or shards.stored_format()
    config = hf_config(facts, dtype)
    merged = expressions(facts, config["model_type"], shards, dtype)
    shards.checkpoint.check({**merged.tensors, **merged.copies})
    _check_family(config, merged.tensors, dtype)
    return Foreign(config, merged.tensors, shards.checkpoint)


def _check_family(config: Mapping[str, Any], tensors: Mapping[str, Value], dtype: str) -> None:
    spec = read_spec(config)
    wanted = {name: type.shape for name, type in declared(weights(spec, config, dtype)).items()}
    made = {name: value.type.shape for name, value in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name)):
        what = ", ".join(f"{n} ({made.get(n)}, expected {wanted.get(n)})" for n in wrong[:3])
        raise CheckpointError(f"the shards do not make the model that their settings describe: {what}")


__all__ = ["FORMATS", "Foreign", "open_foreign"]
