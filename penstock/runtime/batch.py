"""A step made up to be looked at: so many sequences of one length, at rest on a backend that serves nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.engine.groups import StateGroup
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.errors import OptionError
from penstock.ir.lazy import torch
from penstock.ir.ops.state import FIELDS
from penstock.runtime.kv.blocks import DUMMY_BLOCK
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.step import Backend, Ticket
from penstock.runtime.upload import Numbers, slot_numbers
from penstock.spec import inverse_frequencies

SEED = 0


@dataclass(frozen=True)
class Batch:
    """`rows` sequences of `context` tokens each, and `tokens` more of each in the step: 1 decodes, more is a prompt.

    Each of them samples one token, at that temperature, top_k and top_p.
    """

    rows: int = 1
    context: int = 0
    tokens: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def limits(self, profile: Profile) -> Limits:
        """What a backend must be opened for. Raises OptionError where the engine was not built for such a step."""
        for flag, value, least, most, limit in (
            ("--batch", self.rows, 1, profile.max_batch_size, "max_batch_size"),
            ("--prompt_tokens", self.tokens, 1, profile.max_num_tokens, "max_num_tokens"),
            ("--batch times --prompt_tokens", self.rows * self.tokens, 1, profile.max_num_tokens, "max_num_tokens"),
            ("--context", self.context, 0, profile.max_seq_len - self.tokens - 1, "max_seq_len"),
        ):
            if not least <= value <= most:
                higher = f", or build for a higher --{limit}" if value > most else ""
                raise OptionError(
                    f"{flag} {value} is outside {least} to {most}, which the engine was built for "
                    f"({limit}={getattr(profile, limit)}); give another{higher}"
                )
        return Limits(self.rows, self.rows * self.tokens, self.context + self.tokens + 1)

    @property
    def sizes(self) -> dict[str, int]:
        """T, S and L of the step itself, without padding."""
        return {"T": self.rows * self.tokens, "S": self.rows, "L": self.rows}


class Standing:
    """A batch on a backend: `launch` runs the same step again and again, since each upload sets the lengths back."""

    def __init__(self, engine: Engine, backend: Backend, batch: Batch) -> None:
        """`backend` opened for the batch's limits. Random tokens in the slots, random keys and values in the pool."""
        self.backend, self.batch = backend, batch
        _fill(backend)
        self._upload = _upload(engine, batch)

    def launch(self) -> Ticket:
        sizes = self.batch.sizes
        return self.backend.launch(self._upload, sizes["T"], sizes["S"], sizes["L"])

    def run(self) -> list[int]:
        """One step, to its end."""
        return self.backend.read(self.launch())


def _fill(backend: Backend) -> None:
    """Numbers as attention meets them, for zeros cost a GPU less power."""
    for name, state in backend.states.items():
        if name != "slots":
            state.normal_()
    if any(state.device.type == "cuda" for state in backend.states.values()):
        torch.cuda.synchronize()


def _upload(engine: Engine, batch: Batch) -> Numbers:
    """Every slot written whole, at its length before the step, and the step's tokens."""
    layout, numbers = engine.profile.slots, np.random.default_rng(SEED)
    rope = engine.model_spec.request_rope
    freqs = tuple(inverse_frequencies(rope, batch.context + batch.tokens)) if rope else ()
    tables = [_tables(engine, group, batch, numbers) for group in engine.groups]
    pairs: list[Any] = []
    for slot in range(batch.rows):
        drawn = {"temperature": batch.temperature, "top_k": batch.top_k, "top_p": batch.top_p, "seed": slot}
        read = batch.context + batch.tokens if layout.encoder else None  # an input as long as the text
        fields = slot_numbers({"length": batch.context, **drawn}, freqs, read)
        places = [layout.field(name) + slot for name in FIELDS]
        places += range(layout.freqs_at + slot * layout.freqs, layout.freqs_at + (slot + 1) * layout.freqs)
        places += [layout.encoder_at + slot] * layout.encoder
        pairs += [np.stack([np.array(places), fields], 1)]
        for index, table in enumerate(tables):
            start = layout.table_of(slot, index)
            pairs += [np.stack([np.arange(start, start + table.shape[1]), table[slot]], 1)]
        start = layout.history_at + slot * layout.history + batch.context
        ids = numbers.integers(0, engine.vocab_size, batch.tokens)
        pairs += [np.stack([np.arange(start, start + batch.tokens), ids], 1)]
    writes = np.concatenate(pairs).astype(np.int32)
    rows = np.array([(slot, batch.tokens, 1) for slot in range(batch.rows)], np.int32)
    header = np.array([batch.rows, batch.rows * batch.tokens, batch.rows, len(writes)], np.int32)
    return np.concatenate([header, rows.ravel(), writes.ravel()])


def _tables(engine: Engine, group: StateGroup, batch: Batch, numbers: np.random.Generator) -> Numbers:
    """Blocks of every row, each its own; of what falls out of a window before the step the dummy."""
    size, end = engine.profile.block_size, batch.context + batch.tokens
    width, passed = -(-end // size), max(0, batch.context - group.window + 1) // size if group.window else 0
    blocks = 1 + numbers.permutation(batch.rows * (width - passed)).reshape(batch.rows, -1)
    return np.pad(blocks, ((0, 0), (passed, 0)), constant_values=DUMMY_BLOCK).astype(np.int32)
