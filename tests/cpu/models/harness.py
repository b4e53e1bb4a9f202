"""Run a forward graph by its references: pools, block tables and ragged batches, as an executor would lay them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from penstock.engine.groups import BY_SLOT
from penstock.ir import Graph
from penstock.ir.interpret import interpret
from penstock.models import Binding
from penstock.models.binding import declared
from penstock.models.checkpoint import Checkpoint
from penstock.spec import ModelSpec, inverse_frequencies


@dataclass
class Request:
    """One sequence: its known tokens, how many of them are in the cache, and its blocks, the same in every group."""

    tokens: list[int]
    freqs: tuple[float, ...] | None = None  # where the model's rope is fixed by request
    done: int = 0
    blocks: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)  # what an encoder reads
    cross: list[int] = field(default_factory=list)  # blocks of what it makes of that
    slot: int = -1


class Pool:
    """The tensors a graph reads besides a step's inputs: its weights, and KV states of `num_blocks` blocks.

    States start as large finite noise, so that reading what was never written shows; blocks are handed out shuffled.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor], num_blocks: int = 64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.feed: dict[str, Any] = dict(tensors)
        self.block_size = 64  # where no state keeps blocks
        for node in graph.leaves("state"):
            shape = node.types[0].concrete({"N": num_blocks})
            dtype = getattr(torch, node.types[0].format.torch_dtype)
            self.feed[node.name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
            if not str(dict(node.attrs)["group"]).startswith(BY_SLOT):
                self.block_size = int(node.types[0].shape[3])
        self.slots = torch.randperm(num_blocks, generator=generator).tolist()
        self.free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()  # block 0 is the padding's

    def reserve(self, request: Request, num_tokens: int) -> None:
        if request.slot < 0:
            request.slot = self.slots.pop()
        while len(request.blocks) * self.block_size < num_tokens:
            request.blocks.append(self.free.pop())

    def reserve_cross(self, request: Request) -> None:
        while len(request.cross) * self.block_size < len(request.source):
            request.cross.append(self.free.pop())

    def release(self, request: Request) -> None:
        self.free += request.blocks
        self.slots.append(request.slot)
        request.blocks, request.slot = [], -1


def load_tensors(checkpoint: Checkpoint, binding: Binding) -> dict[str, torch.Tensor]:
    """Checkpoint name -> tensor of everything that the binding reads, in its formats."""
    return {name: checkpoint.read(name, type.format.name) for name, type in declared(binding).items()}


def request_freqs(spec: ModelSpec, length: int) -> tuple[float, ...] | None:
    """What admission fixes for a request that may reach `length` tokens."""
    return inverse_frequencies(spec.request_rope, length) if spec.request_rope else None


def run_step(
    graph: Graph, pool: Pool, batch: Sequence[tuple[Request, int]], *, pad_tokens: int = 0, pad_rows: int = 0
) -> torch.Tensor:
    """One step in which each request of `batch` advances by its number of known tokens.

    Returns f32[len(batch), V], the logits of each one's last token, and moves `done` on. Padding tokens (row -1) and
    padding rows (no tokens, block 0) are added behind.
    """
    for request, count in batch:
        assert 0 < count <= len(request.tokens) - request.done
        pool.reserve(request, request.done + count)
    logits: torch.Tensor = interpret(graph, pool.feed | _inputs(batch, pad_tokens, pad_rows))["logits"]
    for request, count in batch:
        request.done += count
    return logits


def _inputs(batch: Sequence[tuple[Request, int]], pad_tokens: int, pad_rows: int) -> dict[str, torch.Tensor]:
    spans = [range(r.done, r.done + n) for r, n in batch]
    counts = [n for _, n in batch]
    ends = torch.tensor(counts).cumsum(0)
    width = max(len(r.blocks) for r, _ in batch)
    lists = {
        "tokens": [r.tokens[i] for (r, _), span in zip(batch, spans, strict=True) for i in span] + [0] * pad_tokens,
        "positions": [i for span in spans for i in span] + [0] * pad_tokens,
        "rows": [s for s, span in enumerate(spans) for _ in span] + [-1] * pad_tokens,
        "query_start": [int(e) - n for e, n in zip(ends, counts, strict=True)] + [0] * pad_rows,
        "query_len": counts + [0] * pad_rows,
        "context_len": [span.stop for span in spans] + [0] * pad_rows,
        "block_table": [r.blocks + [0] * (width - len(r.blocks)) for r, _ in batch] + [[0] * width] * pad_rows,
        "slot_of_row": [r.slot for r, _ in batch] + [-1] * pad_rows,
        "logit_rows": (ends - 1).tolist(),
    }
    lists["block_table1"] = lists["block_table"]  # of a second group, which has a pool of its own
    if batch[0][0].source:
        lists["block_table1"] = _table([r.cross for r, _ in batch], pad_rows)
        lists["encoder_len"] = [len(r.source) for r, _ in batch] + [0] * pad_rows
    feed = {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()}
    freqs = [r.freqs for r, _ in batch if r.freqs is not None]
    if freqs:
        feed["freqs"] = torch.tensor(freqs + [freqs[0]] * pad_rows, dtype=torch.float32)
    return feed


def encode(graph: Graph, pool: Pool, requests: Sequence[Request], *, pad_tokens: int = 0, pad_rows: int = 0) -> None:
    """One run of an encoder over the requests' sources, whole."""
    for request in requests:
        pool.reserve_cross(request)
    counts, table = [len(r.source) for r in requests], _table([r.cross for r in requests], pad_rows)
    lists = {
        "tokens": [t for r in requests for t in r.source] + [0] * pad_tokens,
        "positions": [i for n in counts for i in range(n)] + [0] * pad_tokens,
        "rows": [s for s, n in enumerate(counts) for _ in range(n)] + [-1] * pad_tokens,
        "query_start": [sum(counts[:i]) for i in range(len(counts))] + [0] * pad_rows,
        "query_len": counts + [0] * pad_rows,
        "block_table1": table,
    }
    out = interpret(graph, pool.feed | {name: torch.tensor(x, dtype=torch.int32) for name, x in lists.items()})
    assert all(out[name] is pool.feed[name] for name in graph.names), "states are replaced in place"


def _table(blocks: Sequence[list[int]], pad_rows: int) -> list[list[int]]:
    width = max(map(len, blocks))
    return [own + [0] * (width - len(own)) for own in blocks] + [[0] * width] * pad_rows


def greedy(
    step: Callable[[Sequence[tuple[Request, int]]], torch.Tensor],
    requests: Sequence[Request],
    new_tokens: int,
    *,
    chunk: int = 1 << 30,
    joins: Sequence[int] = (),
) -> list[torch.Tensor]:
    """Every request's prompt in chunks, then `new_tokens` greedy tokens, all in shared steps; `joins` delay some.

    Appends the tokens to each request, the last one included, and returns for each its logits, f32[new_tokens, V].
    """
    collected: list[list[torch.Tensor]] = [[] for _ in requests]
    late = [*joins, *[0] * (len(requests) - len(joins))]
    now = 0
    while any(len(rows) < new_tokens for rows in collected):
        running = [i for i in range(len(requests)) if now >= late[i] and len(collected[i]) < new_tokens]
        batch = [(requests[i], min(chunk, len(requests[i].tokens) - requests[i].done)) for i in running]
        for i, row in zip(running, step(batch) if batch else (), strict=True):
            if requests[i].done == len(requests[i].tokens):
                collected[i].append(row)
                requests[i].tokens.append(int(row.argmax()))
        now += 1
    return [torch.stack(rows) for rows in collected]
