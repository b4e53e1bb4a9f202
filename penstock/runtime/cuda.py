"""The GPU backend: one upload, one graph replay and one small copy back for each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.store import KERNELS
from penstock.errors import ResourceError
from penstock.ir.lazy import torch
from penstock.kernels.driver import load_file
from penstock.runtime.graphs import Graphs, Memory
from penstock.runtime.kv import pool
from penstock.runtime.step import Ticket
from penstock.runtime.upload import Numbers
from penstock.runtime.weights import load_weights

IN_FLIGHT = 2
RING = IN_FLIGHT + 1  # pinned buffers: one may still be copied from while the next is written


@dataclass(frozen=True, slots=True)
class _Lane:
    """Pinned memory of one step in flight."""

    upload: Any
    sampled: Any
    done: Any  # event


class CudaBackend:
    """Owns the device's memory and the captured graphs. `budget`: bytes of device memory that it may use in all."""

    steps_in_flight = IN_FLIGHT

    def __init__(self, engine: Engine, directory: Path, budget: int) -> None:
        self.engine = engine
        before = torch.cuda.memory_allocated()
        memory_left = budget - engine.weight_bytes - engine.arena
        if memory_left <= 0:
            raise ResourceError(
                f"the engine needs {(engine.weight_bytes + engine.arena) / 2**30:.1f} GiB for weights and buffers, "
                f"{budget / 2**30:.1f} GiB may be used; lower max_num_tokens, or raise gpu_memory_utilization or "
                f"max_gpu_bytes"
            )
        weights = load_weights(engine, directory, "cuda")
        kernels = {key: load_file(directory / KERNELS, key, facts) for key, facts in engine.kernels.items()}
        arena = torch.empty(engine.arena, dtype=torch.uint8, device="cuda")
        slots = torch.zeros(engine.profile.slots.size, dtype=torch.int32, device="cuda")
        upload = torch.zeros(engine.profile.upload_size, dtype=torch.int32, device="cuda")
        used = torch.cuda.memory_allocated() - before
        self.num_blocks = pool.choose_blocks(engine, budget - used)
        states = {"slots": slots, **pool.allocate(engine, self.num_blocks, "cuda")}
        self.graphs = Graphs(engine, Memory(arena, upload, weights, states, kernels))
        self.uploads = 0  # copies to the device, for the test that there is at most one a step
        self._lanes: tuple[_Lane, ...] = tuple(self._lane() for _ in range(RING))
        self._count = 0
        self._warm_up()
        self.graphs.capture_sparse()
        torch.cuda.synchronize()

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int) -> Ticket:
        self._count += 1
        lane = self._lanes[self._count % RING]
        lane.done.synchronize()  # the step that used this lane before has been read long ago
        size = len(upload)
        lane.upload[:size].numpy()[:] = upload
        self.graphs.memory.upload[:size].copy_(lane.upload[:size], non_blocking=True)
        self.uploads += 1
        captured = self.graphs.find(tokens, logits)
        captured.graph.replay()
        sampled = captured.results["sampled"]
        lane.sampled[: sampled.numel()].copy_(sampled, non_blocking=True)
        lane.done.record()
        return Ticket(self._count, logits)

    def read(self, ticket: Ticket) -> list[int]:
        assert self._count - ticket.number < RING, f"step {ticket.number} was read too late"
        lane = self._lanes[ticket.number % RING]
        lane.done.synchronize()
        return list(lane.sampled[: ticket.logits].tolist())

    def idle(self) -> bool:
        return self.graphs.capture_next()

    def counters(self) -> Mapping[str, int]:
        """buckets, buckets_captured; steps_in_larger_buckets, for want of a capture; uploads; reference_nodes: nodes
        of a step that no kernel runs."""
        return {
            "buckets": self.graphs.count,
            "buckets_captured": len(self.graphs.captured),
            "steps_in_larger_buckets": self.graphs.larger,
            "uploads": self.uploads,
            "reference_nodes": self.graphs.reference_nodes,
        }

    def close(self) -> None:
        """Give the device's memory back."""
        torch.cuda.synchronize()
        self.graphs.close()
        self._lanes = ()
        torch.cuda.empty_cache()

    def _lane(self) -> _Lane:
        profile = self.engine.profile
        return _Lane(
            torch.zeros(profile.upload_size, dtype=torch.int32, pin_memory=True),
            torch.zeros(profile.max_batch_size, dtype=torch.int32, pin_memory=True),
            torch.cuda.Event(),
        )

    def _warm_up(self) -> None:
        """Create this thread's library handles and workspaces, which must not be made under capture."""
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.ones(16, 16, dtype=dtype, device="cuda")
            torch.mm(x, x)
            torch.addmm(x[0], x, x)
            if dtype != torch.float32:
                torch.mm(x, x, out_dtype=torch.float32)
        torch.cuda.synchronize()
