"""One step of the engine on a device: take an upload, run prepare, forward, sample and commit, give the tokens.

Both backends keep requests in slots, so that the next step can be launched before this one's tokens were read. The CPU
runs the plans' calls eagerly at the step's exact sizes; the GPU replays the CUDA graph of the step's bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.engine.manifest import Engine
from penstock.engine.program import Phase, Site, Sizes
from penstock.ir.lazy import torch
from penstock.kernels.launch import run_eager
from penstock.runtime.kv import pool
from penstock.runtime.upload import Numbers
from penstock.runtime.weights import load_weights


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launched step: what `read` needs to fetch its tokens."""

    number: int
    logits: int


class Backend(Protocol):
    """A device that runs an engine's steps in the order they are launched."""

    num_blocks: int
    steps_in_flight: int  # how many may be launched before the first is read

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int) -> Ticket:
        """Start a step of so many tokens, rows and logit rows; returns at once."""
        ...

    def read(self, ticket: Ticket) -> list[int]:
        """Wait for a step; the token of each of its logit rows."""
        ...

    def idle(self) -> bool:
        """Use a moment without work; True while there is more to do."""
        ...

    def close(self) -> None: ...


class CpuBackend:
    """The references, one after another."""

    steps_in_flight = 1

    def __init__(self, engine: Engine, directory: Path, kv_bytes: int = pool.CPU_POOL_BYTES) -> None:
        self.engine = engine
        self.num_blocks = pool.choose_blocks(engine, kv_bytes)
        self.weights = load_weights(engine, directory, "cpu")
        slots = torch.zeros(engine.profile.slots.size, dtype=torch.int32)
        self.states: dict[str, Any] = {"slots": slots, **pool.allocate(engine, self.num_blocks, "cpu")}
        self.last: dict[str, Any] = {}  # named results of the last step, for tests and for looking inside
        self._results: dict[int, list[int]] = {}
        self._count = 0

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int) -> Ticket:
        sizes = {**self.engine.profile.sizes(tokens, logits), "S": rows}
        named: dict[str, Any] = {"upload": torch.from_numpy(upload)}
        with torch.no_grad():
            for phase in self.engine.programs["decode"].phases.values():
                named |= self._run(phase, named, sizes)
        self.last = named
        self._count += 1
        self._results[self._count] = named["sampled"].tolist()
        return Ticket(self._count, logits)

    def read(self, ticket: Ticket) -> list[int]:
        return self._results.pop(ticket.number)

    def idle(self) -> bool:
        return False

    def close(self) -> None:
        self.states.clear()

    def _run(self, phase: Phase, named: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """One phase's named results."""
        env: dict[Any, Any] = {}
        for node in phase.graph.nodes:
            if node.is_leaf:
                env[node[0]] = self._leaf(node.op, node.name, named)
            else:
                plan = phase.plans[Site.of(node).key]["any"]
                results = run_eager(node.op, plan, [env[v] for v in node.inputs], len(node.types), sizes)
                env.update(zip(node.outputs, results, strict=True))
        return {name: env[v] for name, v in zip(phase.graph.names, phase.graph.outputs, strict=True)}

    def _leaf(self, kind: str, name: str, named: Mapping[str, Any]) -> Any:
        return {"weight": self.weights, "state": self.states, "input": named}[kind][name]
