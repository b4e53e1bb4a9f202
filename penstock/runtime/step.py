"""One step of the engine on a device: take an upload, run prepare, forward, sample and commit, give the tokens.

Both backends keep requests in slots, so that the next step can be launched before this one's tokens were read. The CPU
runs the plans' calls eagerly at the step's exact sizes; the GPU replays the CUDA graph of the step's bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from penstock.engine.manifest import Engine
from penstock.engine.memory import Limits
from penstock.engine.program import CONTROLLED_TAIL, FRONT, SCORES, TAIL, Phase, Sizes
from penstock.ir.graph import Node
from penstock.ir.lazy import torch
from penstock.kernels.launch import Eager
from penstock.runtime.kv import pool
from penstock.runtime.kv.host import Restored, Saved
from penstock.runtime.kv.tables import Copy
from penstock.runtime.masks import Masker, Masks
from penstock.runtime.upload import Numbers, Reals
from penstock.runtime.weights import load_weights


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launched step: what `read` needs to fetch its tokens."""

    number: int
    logits: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of a controlled step, for each row of logits: see `ir.ops.control.logprobs`."""

    top_ids: Numbers  # i32[L,32]
    top_values: Reals  # f32[L,32]
    chosen: Reals  # f32[L]


@dataclass(frozen=True, slots=True)
class Tail:
    """What a step does behind its logits. `controlled`: rows may be. `rewrite`: first gets, for each of `rows` of the
    logits, that row on the host, f32[V], and gives what takes its place; the step waits for it. `masks`: then, when the
    forward is launched, writes the masks of rows into the bits it gets, i32[R,W]."""

    controlled: bool = False
    rows: tuple[int, ...] = ()
    rewrite: Callable[[int, Any], Any] | None = None
    masks: Callable[[Any], Masks] | None = None

    def edit(self, logits: Any, masker: Callable[[], Masker]) -> Mapping[int, Any]:
        """Rewrite and mask rows in place; of masked ones that are scored, gives what `Masker.mend` needs."""
        for row in self.rows:
            assert self.rewrite is not None
            logits[row].copy_(self.rewrite(row, logits[row].to("cpu", copy=True)))
        if self.masks is None:
            return {}
        return masker().apply(logits, self.masks(masker().bits))


PLAIN_TAIL = Tail()

# Hears of each node of a step as it has run: its phase, the node, its results (padded on a GPU), and the step's own
# T, S and L. Results are overwritten by nodes that follow.
Visit = Callable[[str, Node, Sequence[Any], Mapping[str, int]], None]
Timer = Callable[[Callable[[], None]], None]  # runs a step's replay, and may look at the clock before and after


class Backend(Protocol):
    """A device that runs an engine's steps in the order they are launched."""

    num_blocks: tuple[int, ...]  # of each group's pool
    host_blocks: int  # of the host's memory, for KV blocks that each pool gave away; 0: none
    steps_in_flight: int  # how many may be launched before the first is read
    load_seconds: Mapping[str, float]  # opening it took so long, by stage; stages may overlap
    memory: Mapping[str, int]  # bytes, as planned; empty where there is no plan
    visit: Visit | None  # where somebody looks inside: the next steps run node by node
    timer: Timer | None  # where somebody times replays
    slow_steps: int  # launched so far that waited for something, or ran in a larger bucket or node by node
    states: Mapping[str, Any]  # by name: the slots, and each layer's own

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int, tail: Tail = PLAIN_TAIL) -> Ticket:
        """Start a step of so many tokens, rows and logit rows; returns at once, unless its tail rewrites logits or the
        first steps of a kind have to be captured."""
        ...

    def encode(self, upload: Numbers, tokens: int, rows: int) -> None:
        """Start an encoder's run over so many tokens of so many whole inputs: before whatever is launched next."""
        ...

    def read(self, ticket: Ticket) -> list[int]:
        """Wait for a step; the token of each of its logit rows."""
        ...

    def scores(self, ticket: Ticket) -> Scores:
        """Of a controlled step that was read just now; good until the next launch."""
        ...

    def fork(self, histories: Sequence[tuple[int, int]], blocks: Sequence[Copy]) -> None:
        """Copy slots' histories, (from, to) each, and KV blocks with all layers of their groups: behind all that was
        launched, before whatever is launched next."""
        ...

    def save_blocks(self, blocks: Sequence[Saved]) -> None:
        """Copy KV blocks with all layers of their groups to the host's, no host block twice: behind all that was
        launched, before whatever comes next."""
        ...

    def restore_blocks(self, blocks: Sequence[Restored]) -> None:
        """The same back."""
        ...

    def idle(self) -> bool:
        """Use a moment without work; True while there is more to do."""
        ...

    def meanwhile(self) -> None:
        """Use the wait for a step that was launched: load without a pause leaves no moment without work."""
        ...

    def counters(self) -> Mapping[str, int]:
        """Facts for the statistics."""
        ...

    def close(self) -> None: ...


# Slot 0 runs one token of block 0, the dummy, and samples.
_ONE_TOKEN = np.array([1, 1, 1, 0, 0, 1, 1], np.int32)


class CpuBackend:
    """The references, one after another, at each step's exact sizes."""

    steps_in_flight = 1

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        kv_bytes: int = pool.CPU_POOL_BYTES,
        limits: Limits | None = None,
        host_blocks: int = 0,
    ) -> None:
        """`limits` within the engine's profile; None: the profile's own."""
        start = time.perf_counter()
        self.engine = engine
        self.num_blocks = pool.choose_blocks(engine, kv_bytes, limits)
        self.weights = load_weights(engine, directory)
        slots = torch.zeros(engine.profile.slots.size, dtype=torch.int32)
        rows = (limits or engine.profile).max_batch_size
        kv = pool.allocate(engine, self.num_blocks, rows, pool.host_bytes)
        self.states: Mapping[str, Any] = {"slots": slots, **kv}
        self.host_blocks = host_blocks
        self._kv = [
            (group, kv[node.name], kv[node.name].new_empty(host_blocks, *kv[node.name].shape[1:]))
            for group, states in enumerate(engine.groups)
            for node in states.states
        ]
        self.last: dict[str, Any] = {}  # named results of the last step, for tests and for looking inside
        self._phases = {name: _Phase(name, phase) for name, phase in engine.programs["decode"].phases.items()}
        encoder = engine.encoder.phases if engine.encoder else {}
        self._encoder = [_Phase(name, phase) for name, phase in encoder.items()]
        self._results: dict[int, tuple[list[int], Scores | None]] = {}
        self._scores: Scores | None = None  # of the step that was read last
        self._count = 0
        self._masker = cache(lambda: Masker("cpu", engine.profile.max_batch_size, engine.vocab_size))
        self.visit: Visit | None = None
        self.timer: Timer | None = None
        self.slow_steps = 0
        self.memory: Mapping[str, int] = {}
        self.threads = self._quickest_threads()
        self.load_seconds: Mapping[str, float] = {"load": time.perf_counter() - start}

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int, tail: Tail = PLAIN_TAIL) -> Ticket:
        sizes = {**self.engine.profile.sizes(tokens, logits), "S": rows}
        leaves: dict[str, Any] = {**self.weights, **self.states, "upload": torch.from_numpy(upload)}
        with torch.no_grad(), using_threads(self.threads):
            for name in FRONT:
                leaves |= self._phases[name].run(leaves, sizes, self.visit)
            self.slow_steps += bool(tail.rows) or self.visit is not None
            raw = tail.edit(leaves["logits"], self._masker)
            leaves |= self._phases[CONTROLLED_TAIL if tail.controlled else TAIL].run(leaves, sizes, self.visit)
            if raw:
                self._masker().mend(leaves, raw)
        self.last = leaves
        self._count += 1
        scores = Scores(*(leaves[name].numpy() for name in SCORES)) if tail.controlled else None
        self._results[self._count] = leaves["sampled"].tolist(), scores
        return Ticket(self._count, logits)

    def encode(self, upload: Numbers, tokens: int, rows: int) -> None:
        sizes = {**self.engine.profile.sizes(tokens, 0), "S": rows}
        leaves: dict[str, Any] = {**self.weights, **self.states, "upload": torch.from_numpy(upload)}
        with torch.no_grad(), using_threads(self.threads):
            for phase in self._encoder:
                leaves |= phase.run(leaves, sizes)

    def _quickest_threads(self) -> int:
        """All of torch's threads where they clearly pay, else one; timed on the thread that will run the steps.

        A small model's products are over before a second thread has woken up, and trial steps keep it awake: between
        real ones it sleeps. So a gain of less than a quarter is none.
        """

        def seconds(threads: int) -> float:
            self.threads, times = threads, []
            for _ in range(7):
                start = time.perf_counter()
                self.read(self.launch(_ONE_TOKEN, tokens=1, rows=1, logits=1))
                self.states["slots"].zero_()  # each step lengthens the slot
                times.append(time.perf_counter() - start)
            return sorted(times)[3]

        most: int = torch.get_num_threads()
        chosen = most if seconds(most) < 0.75 * seconds(1) else 1
        return chosen

    def read(self, ticket: Ticket) -> list[int]:
        tokens, self._scores = self._results.pop(ticket.number)
        return tokens

    def scores(self, ticket: Ticket) -> Scores:
        assert self._scores is not None, f"step {ticket.number} was not controlled"
        return self._scores

    def fork(self, histories: Sequence[tuple[int, int]], blocks: Sequence[Copy]) -> None:
        layout = self.engine.profile.slots
        own = self.states["slots"][layout.history_at :].view(layout.num_slots, layout.history)
        _copy_rows(own, own, histories)
        for group, state, _ in self._kv:
            _copy_rows(state, state, of_group(blocks, group))

    def save_blocks(self, blocks: Sequence[Saved]) -> None:
        for group, state, host in self._kv:
            _copy_rows(state, host, of_group(blocks, group))

    def restore_blocks(self, blocks: Sequence[Restored]) -> None:
        for group, state, host in self._kv:
            _copy_rows(host, state, of_group(blocks, group))

    def idle(self) -> bool:
        return False

    def meanwhile(self) -> None:
        return

    def counters(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None:
        self.states, self._kv = {}, []


def of_group(blocks: Sequence[Copy] | Sequence[Saved] | Sequence[Restored], group: int) -> list[tuple[int, int]]:
    """(from, to) of those blocks that are of this group."""
    return [(each[0], each[1]) for each in blocks if each.group == group]


def _copy_rows(source: Any, target: Any, pairs: Sequence[tuple[int, int]]) -> None:
    """(from, to) each; none is both where source and target are one."""
    rows, places = ([pair[i] for pair in pairs] for i in (0, 1))
    target[places] = source[rows]


class _Phase:
    """A phase with its plans resolved and its values numbered. Weights, states, inputs and results share one naming."""

    def __init__(self, name: str, phase: Phase) -> None:
        self.name = name
        index = {value: i for i, value in enumerate(v for n in phase.graph.nodes for v in n.outputs)}
        self._size = len(index)
        self._leaves = [(n.name, index[n[0]]) for n in phase.graph.nodes if n.is_leaf]
        self._steps = [
            (
                n,
                Eager(n.op, phase.plan(n, "any"), len(n.inputs), len(n.types)),
                [index[v] for v in n.inputs],
                [index[v] for v in n.outputs],
            )
            for n in phase.graph.nodes
            if not n.is_leaf
        ]
        self._results = [(name, index[v]) for name, v in zip(phase.graph.names, phase.graph.outputs, strict=True)]

    def run(self, leaves: Mapping[str, Any], sizes: Sizes, visit: Visit | None = None) -> dict[str, Any]:
        """The phase's named results."""
        env: list[Any] = [None] * self._size
        for name, i in self._leaves:
            env[i] = leaves[name]
        for node, eager, sources, targets in self._steps:
            results = eager([env[i] for i in sources], sizes)
            for target, result in zip(targets, results, strict=True):
                env[target] = result
            if visit is not None:
                visit(self.name, node, results, sizes)
        return {name: env[i] for name, i in self._results}


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Torch's own setting is left as it was found."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
