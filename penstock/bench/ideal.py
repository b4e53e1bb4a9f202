"""The roof of a workload: how fast its requests could be served at best, were they all there at the start."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.bench.requests import Asked
from penstock.engine.ideal import AttentionCost
from penstock.engine.manifest import Engine
from penstock.kernels.roof import Roof


@dataclass(frozen=True, slots=True)
class Ideal:
    """Seconds. `serial`: one kernel after another, each at the rate that bounds it: a step's products take the longer
    of their weights' bytes and their operations, and its attention follows them. `overlapped`: the bytes of a step's
    attention hide behind the operations of its products, or these behind those.
    """

    serial: float
    overlapped: float


def ideal(engine: Engine, roof: Roof, requests: Sequence[Asked], batch: int, reuse: bool) -> Ideal:
    """Requests are served in order, at most `batch` at once. A prompt's tokens, less those that `reuse` finds, cost
    their operations, in steps that read no weights of their own; then every step gives each running request a token.
    A prefix that was found is read once a step, whoever shares it.
    """
    model, waiting = _Model(engine, roof, reuse), list(reversed(requests))
    while waiting or model.running:
        while waiting and len(model.running) < batch:
            model.admit(waiting.pop())
        if model.running:
            model.step()
    return Ideal(model.serial, model.overlapped)


class _Row(NamedTuple):
    """The step at which it ends, the tokens it then has, and those of them that another has too."""

    end: int
    tokens: int
    found: int


@dataclass
class _Model:
    engine: Engine
    roof: Roof
    reuse: bool
    running: list[_Row] = field(default_factory=list)  # a heap
    serial: float = 0.0
    overlapped: float = 0.0
    _steps: int = 0
    _context: int = 0  # tokens of all running

    def __post_init__(self) -> None:
        self._attention, self._work = AttentionCost(self.engine), self.engine.work

    def admit(self, each: Asked) -> None:
        """Its prompt, and with that its first token."""
        block, length = self.engine.profile.block_size, len(each.prompt)
        found = min(each.shared, length - 1) // block * block if self.reuse else 0
        operations = (length - found) * self._work["flops_per_token"] + self._work["flops_per_logit"]
        seconds = (operations + self._attention.flops(length - found, found)) / self.roof.flops_per_s
        self.serial, self.overlapped = self.serial + seconds, self.overlapped + seconds
        if each.new > 1:
            heapq.heappush(self.running, _Row(self._steps + each.new - 1, length + each.new - 1, found))
            self._context += length

    def step(self) -> None:
        rows, work = len(self.running), self._work
        self._context += rows
        products = rows * (work["flops_per_token"] + work["flops_per_logit"])
        read = (self._context - self._read_already()) * work["kv_bytes_per_token"]
        scores = rows * self._attention.flops(1, self._context // rows)
        weights = self.engine.step_bytes(rows)
        self.serial += self.roof.seconds(weights, products) + self.roof.seconds(read, scores)
        self.overlapped += self.roof.seconds(weights + read, products + scores)
        self._steps += 1
        while self.running and self.running[0].end == self._steps:
            self._context -= heapq.heappop(self.running).tokens

    def _read_already(self) -> int:
        """Tokens that several share, but for the first that reads them: who computed them, or one who found them."""
        found = [row.found for row in self.running]
        return sum(found) - (max(found) if all(found) else 0)
