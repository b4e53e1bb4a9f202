"""A model directory, whichever of the layouts it is in: Hugging Face's, or TensorRT-LLM's with a file for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.errors import UnsupportedError
from penstock.models import trtllm
from penstock.models.binding import Binding, declared
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import load_config
from penstock.models.registry import family_of, ignored_tensors, read_spec, weights
from penstock.models.trtllm.ranks import HEAD, TABLE
from penstock.spec import ModelSpec


@dataclass(frozen=True)
class ModelDirectory:
    """What a directory holds, from its config and headers alone.

    stored: config.json as it stands. config: the Hugging Face config of the model, which families read. spec: of the
    tensors as they are stored (TensorRT-LLM stores the factors of norms, so theirs have no offset).
    """

    path: Path
    stored: Mapping[str, Any]
    config: Mapping[str, Any]
    spec: ModelSpec
    ranks: trtllm.Ranks | None = None  # None: Hugging Face's layout

    @classmethod
    def open(cls, path: Path) -> ModelDirectory:
        """Raises ConfigError, UnsupportedArchitectureError or UnsupportedError for what is not fully understood."""
        stored = load_config(path)
        if not trtllm.is_trtllm(stored):
            return cls(path, stored, stored, read_spec(stored))
        about = trtllm.describe(stored, lambda ranks: _has_head(path, ranks))
        return cls(path, stored, about.config, trtllm.stored_factors(read_spec(about.config)), about.ranks)

    def headless(self) -> ModelDirectory:
        """The same without its head. Raises UnsupportedError where that is not built."""
        if self.spec.encoder or self.ranks is not None:
            what = "an encoder-decoder" if self.spec.encoder else "a TensorRT-LLM checkpoint"
            raise UnsupportedError(f"task='embed' of {what} is not built yet; {self.path} is one, use a decoder of "
                                   f"Hugging Face's layout")  # fmt: skip
        return replace(self, spec=replace(self.spec, head=False))

    def binding(self, format: str) -> Binding:
        """Canonical name -> expression over the directory's tensors, each read in `format`."""
        return weights(self.spec, self.config, format) if self.ranks is None else self._merged(format).binding

    def checkpoint(self, binding: Binding | None = None) -> Checkpoint:
        """The tensors, proved to be the model's. `binding`: the directory's own in any format, where it is at hand.

        Raises CheckpointError for one missing, misshapen or left over.
        """
        if self.ranks is None:
            self._files.check(binding or self.binding("f32"), ignored_tensors(self.spec, self.config))
        else:
            merged = self._merged("f32")
            self._files.check({**merged.binding, **merged.copies}, trtllm.tied_copies(self.spec))
        return self._files

    @cached_property
    def _files(self) -> Checkpoint:
        if self.ranks is not None:
            return Checkpoint.open_ranks(self.path, self.ranks.count)
        files = Checkpoint.open(self.path).renamed(family_of(self.config).renamed)
        return files if self.spec.head else self._below_model(files)

    def _below_model(self, files: Checkpoint) -> Checkpoint:
        """A model that was stored without its head lacks what names of the whole one begin with."""
        wanted = declared(self.binding("f32"))
        first = {name.partition(".")[0] for name in wanted}
        if len(first) > 1 or any(name in files.tensors for name in wanted):
            return files
        return files.renamed([("^", f"{first.pop()}.")])

    def _merged(self, format: str) -> trtllm.Merged:
        assert self.ranks is not None
        return trtllm.merge(self.spec, format, self.ranks, self._table_rows(self.ranks))

    def _table_rows(self, ranks: trtllm.Ranks) -> int:
        """An embedding that every rank has whole is padded in some families' files, as its tied head is."""
        rows, padded = self.spec.vocab_size, ranks.padded(self.spec.vocab_size)
        if padded == rows or not (self.path / "rank0.safetensors").is_file():
            return rows
        return padded if self._files.info(f"rank0/{TABLE}").shape[:1] == (padded,) else rows


def _has_head(path: Path, ranks: trtllm.Ranks) -> bool:
    """Whether the last stage has an lm_head; true where there are no files to tell (weights made at random)."""
    last = ranks.count - 1
    if not (path / f"rank{last}.safetensors").is_file():
        return True
    return f"rank{last}/{HEAD}" in Checkpoint.open_ranks(path, ranks.count).tensors
