"""Drive a backend along given tokens, bypassing the scheduler: what would the model have said at every position?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.engine.manifest import Engine
from penstock.runtime.upload import Numbers

DUMMY = 1  # blocks that rows do not own


@dataclass
class Forced:
    """Rows of a batch whose tokens the caller decides. `backend` is a CpuBackend or a CudaBackend at rest."""

    engine: Engine
    backend: object

    def run(self, sequences: Sequence[Sequence[int]], prompt: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence, logits f32[n,V] at its positions from prompt[i] - 1 on, one decode step a position.

        The first prompt[i] tokens go in as one chunk, each alone in its step; the rest one token a step, all
        sequences side by side.
        """
        rows: list[list[torch.Tensor]] = [[] for _ in sequences]
        for slot, (tokens, count) in enumerate(zip(sequences, prompt, strict=True)):
            upload = self._upload([(slot, count, 1)], self._admit(slot) + self._tokens(slot, 0, tokens[:count]))
            rows[slot].append(self._logits(upload, count, 1)[0])
        for step in range(max(len(s) - c for s, c in zip(sequences, prompt, strict=True))):
            live = [i for i, s in enumerate(sequences) if prompt[i] + step < len(s)]
            writes = [w for i in live for w in self._tokens(i, prompt[i] + step, [sequences[i][prompt[i] + step]])]
            logits = self._logits(self._upload([(i, 1, 1) for i in live], writes), len(live), len(live))
            for row, i in zip(logits, live, strict=False):
                rows[i].append(row)
        return [torch.stack(r) for r in rows]

    def _admit(self, slot: int) -> list[tuple[int, int]]:
        layout = self.engine.profile.slots
        width = layout.table
        fields = [(layout.field(name) + slot, 0) for name in ("length", "temperature", "top_k", "top_p", "seed")]
        blocks = [(layout.table_at + slot * width + i, DUMMY + slot * width + i) for i in range(width)]
        return fields + blocks

    def _tokens(self, slot: int, start: int, tokens: Sequence[int]) -> list[tuple[int, int]]:
        layout = self.engine.profile.slots
        return [(layout.history_at + slot * layout.history + start + i, t) for i, t in enumerate(tokens)]

    def _upload(self, rows: list[tuple[int, int, int]], writes: list[tuple[int, int]]) -> Numbers:
        header = [len(rows), sum(n for _, n, _ in rows), sum(s for _, _, s in rows), len(writes)]
        flat = [*header, *(x for row in rows for x in row), *(x for pair in writes for x in pair)]
        return np.array(flat, np.int32)

    def _logits(self, upload: Numbers, tokens: int, logits: int) -> torch.Tensor:
        backend = self.backend
        ticket = backend.launch(upload, tokens, int(upload[0]), logits)  # type: ignore[attr-defined]
        backend.read(ticket)  # type: ignore[attr-defined]
        if hasattr(backend, "graphs"):
            captured = backend.graphs.find(tokens, int(upload[0]), logits)
            return captured.results["logits"][:logits].float().cpu()
        return backend.last["logits"].clone()  # type: ignore[attr-defined]
