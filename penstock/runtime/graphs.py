"""Capturing a program's buckets as CUDA graphs over fixed memory, and finding the graph of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.memory import Key, Limits, bucket_keys, encoder_sizes, single_keys
from penstock.engine.program import (
    CONTROLLED,
    CONTROLLED_TAIL,
    DECODE,
    ENCODE,
    FRONT,
    PLAIN,
    Call,
    Phase,
    Plan,
    Program,
    Sizes,
    bucket_name,
    encoder_bucket,
)
from penstock.ir.graph import Node, Value
from penstock.ir.lazy import torch
from penstock.ir.op import get
from penstock.kernels.driver import Kernel
from penstock.kernels.launch import Step, bind, view
from penstock.kernels.tactic import REFERENCE


class Kind(Enum):
    """What a graph holds. FRONT and TAIL together are a step that is controlled."""

    WHOLE = "a plain step"
    SINGLES = "a plain step in which every row is a single token, without the launches that then have nothing to do"
    FRONT = "a step up to its logits"
    TAIL = "from the logits on, where rows may be controlled"
    ENCODER = "an encoder's run"

    @property
    def phases(self) -> tuple[str, ...]:
        """Of the program, those it replays."""
        return {Kind.FRONT: FRONT, Kind.ENCODER: FRONT, Kind.TAIL: (CONTROLLED_TAIL,)}.get(self, PLAIN)


NEAR, MARGIN = 1.12, 8  # a bucket so many times as large, and tokens, is little larger


@dataclass(frozen=True, slots=True)
class Captured:
    """One bucket's graph, and where it leaves the sampled tokens and its other named results."""

    graph: Any
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Memory:
    """Everything that graphs read and write; allocated once, never moved."""

    arena: Any  # u8
    zeroed: Any  # u8, zeros between nodes: every plan leaves it as it found it
    upload: Any  # i32[U]
    weights: Mapping[str, Any]
    states: Mapping[str, Any]
    kernels: Mapping[str, Kernel]


@dataclass(frozen=True, slots=True)
class BoundNode:
    """A node's plan on the memory of one bucket: `steps` launch it, `outputs` are where its results will be."""

    phase: str
    node: Node
    plan: Plan
    outputs: tuple[Any, ...]
    steps: tuple[Step, ...]

    def run(self) -> None:
        """Launch it on the current stream."""
        for step in self.steps:
            step()


@dataclass(frozen=True, slots=True)
class Bound:
    """A step or a part of it: its nodes in the order they run, and its named results."""

    nodes: tuple[BoundNode, ...]
    named: Mapping[str, Any]

    def of(self, phases: Sequence[str]) -> Bound:
        """Only these phases."""
        return Bound(tuple(node for node in self.nodes if node.phase in phases), self.named)

    def run(self) -> None:
        """Launch every node on the current stream."""
        for each in self.nodes:
            each.run()


class Graphs:
    """The captured buckets of an engine's programs, as far as steps within the limits can need them. The key of a
    bucket of an encoder's runs has no logits.

    A bucket in which launches have nothing to do where every row is a single token is captured without them as well.
    Either graph gives such a step the same bits. The parts of controlled steps are captured once there are such.

    `limits`: None for the profile's own. `stream`: where captures are recorded; the library's workspace for it has to
    be there before, so that capturing allocates nothing.
    """

    def __init__(self, engine: Engine, memory: Memory, stream: Any, limits: Limits | None = None) -> None:
        self.engine, self.memory = engine, memory
        self.larger = 0  # steps that ran in a larger bucket than their own, for want of its capture
        self.late = 0  # controlled steps that had to wait for their capture
        self._parts_wanted = False
        self._missed: set[tuple[Key, Kind]] = set()  # a step ran in a larger bucket than these
        self._due: dict[tuple[Key, Kind], None] = {}  # and a second one, so that they will be wanted again
        self._captured: dict[tuple[Key, Kind], Captured] = {}
        self._wanted = [(key, Kind.WHOLE) for key in bucket_keys(engine.profile, limits)]
        self._wanted += [(key, Kind.SINGLES) for key in single_keys(engine, limits)]
        self._wanted += [
            ((size, 0), Kind.ENCODER) for size in encoder_sizes(engine, bucket_keys(engine.profile, limits))
        ]
        self._every = frozenset(self._wanted)
        self.stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def count(self) -> int:
        """Buckets to capture, once for each kind that is wanted."""
        return len(self._wanted)

    @property
    def done(self) -> int:
        """Of those, how many are."""
        return sum(each in self._captured for each in self._wanted)

    @cached_property
    def reference_nodes(self) -> int:
        """Nodes of a step of one token that run by their reference, the last resort."""
        program = self.engine.programs[DECODE]
        plans = (
            phase.plan(node, bucket_name(1, 1))
            for phase in program.phases.values()
            for node in phase.graph.nodes
            if not node.is_leaf
        )
        return sum(any(isinstance(x, Call) and x.name == REFERENCE for x in plan.launches) for plan in plans)

    def capture_sparse(self) -> None:
        """The tuned buckets, largest first: enough for any step, at worst padded to the next of them."""
        whole = [key for key, kind in self._wanted if kind is Kind.WHOLE]
        tuned = {*self.engine.profile.tuned_buckets, whole[-1][0]}
        for kind in (Kind.WHOLE, Kind.SINGLES, Kind.ENCODER):
            for key in reversed([k for k, its in self._wanted if its is kind and k[0] in tuned]):
                self.capture(key, kind)

    def capture_next(self) -> bool:
        """One more of the buckets left; False when none is."""
        missing = next((each for each in self._wanted if each not in self._captured), None)
        if missing is not None:
            self.capture(*missing)
        return missing is not None

    @property
    def is_due(self) -> bool:
        """Whether steps have missed a bucket more than once."""
        return bool(self._due)

    def capture_due(self) -> bool:
        """The one that they missed twice first; False where none is left."""
        self.capture(*next(iter(self._due)))
        return self.is_due

    def _miss(self, key: Key, kind: Kind) -> None:
        self.larger += 1
        if (key, kind) in self._missed:
            self._due[key, kind] = None
        self._missed.add((key, kind))

    def find(self, tokens: int, rows: int, logits: int) -> Captured:
        """The smallest captured bucket that holds the step; a larger one than its own is counted."""
        key = self.engine.profile.bucket(tokens, max(logits, 1))
        kinds = (Kind.SINGLES, Kind.WHOLE) if rows == tokens else (Kind.WHOLE,)
        own = next((self._captured[key, kind] for kind in kinds if (key, kind) in self._captured), None)
        if own is not None:
            return own
        self._miss(key, next(kind for kind in kinds if (key, kind) in self._every))
        fits = ((k, found) for (k, kind), found in self._captured.items() if kind in kinds)
        return min((fit for fit in fits if fit[0][0] >= key[0] and fit[0][1] >= key[1]), key=lambda fit: fit[0])[1]

    def find_encoder(self, tokens: int) -> Captured:
        """The same of an encoder's run."""
        key = self.engine.profile.bucket(tokens, 1)[0], 0
        fits = sorted(k for k, kind in self._captured if kind is Kind.ENCODER and k >= key)
        self.larger += fits[0] != key
        return self._captured[fits[0], Kind.ENCODER]

    def parts(self, tokens: int, logits: int) -> tuple[Captured, Captured]:
        """A controlled step in two graphs, up to its logits and from them on: of its own bucket, or of one little
        larger, which is counted. With neither there they are captured now, which is counted too; others are from now
        on captured in idle moments.
        """
        key = self.engine.profile.bucket(tokens, max(logits, 1))
        if not self._parts_wanted:
            self._parts_wanted = True
            self._wanted += [(each, Kind.FRONT) for each, kind in self._wanted if kind is Kind.WHOLE]
        if (key, Kind.FRONT) not in self._captured:
            near = [k for k, kind in self._captured if kind is Kind.FRONT and _little_larger(key, k)]
            if near:
                self._miss(key, Kind.FRONT)
                key = min(near)
            else:
                self.late += 1
                self.capture(key, Kind.FRONT)
        return self._captured[key, Kind.FRONT], self._captured[key, Kind.TAIL]

    def exact(self, tokens: int, rows: int, logits: int) -> tuple[Bound, Captured]:
        """A plain step in its own bucket, to be looked at, and its graph, captured now if it was not before."""
        key = self.engine.profile.bucket(tokens, max(logits, 1))
        singles = rows == tokens and (key, Kind.SINGLES) in self._wanted
        kind = Kind.SINGLES if singles else Kind.WHOLE
        if (key, kind) not in self._captured:
            self.capture(key, kind)
        return self.bind(key, singles), self._captured[key, kind]

    def close(self) -> None:
        """Forget the graphs and the memory they point to."""
        self._captured.clear()
        self.memory = None  # type: ignore[assignment]  # nothing may be captured any more

    def capture(self, key: Key, kind: Kind) -> None:
        """Bind the nodes of a bucket to its memory, and capture those of that kind; with a FRONT its TAIL."""
        self._missed.discard((key, kind))
        self._due.pop((key, kind), None)
        if kind is Kind.ENCODER:
            bound = self._bound(self.engine.programs[ENCODE], encoder_bucket(key[0]), False, FRONT)
            self._captured[key, kind] = Captured(self._recorded(bound), bound.named)
            return
        parts = kind is Kind.FRONT
        bound = self.bind(key, kind is Kind.SINGLES, CONTROLLED if parts else PLAIN)
        for each in (Kind.FRONT, Kind.TAIL) if parts else (kind,):
            self._captured[key, each] = Captured(self._recorded(bound.of(each.phases)), bound.named)

    def _recorded(self, bound: Bound) -> Any:
        """Its graph. Nothing is waited for and nothing freed, as torch's own context manager would: weights may be on
        their way."""
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                bound.run()
            finally:
                graph.capture_end()
        return graph

    def bind(self, key: Key, singles: bool = False, phases: Sequence[str] = PLAIN) -> Bound:
        """The step of a bucket on this memory; `singles`: one in which every row is a single token."""
        return self._bound(self.engine.programs[DECODE], bucket_name(*key), singles, phases)

    def _bound(self, program: Program, name: str, singles: bool, phases: Sequence[str]) -> Bound:
        sizes = program.buckets[name]
        named: dict[str, Any] = {"upload": self.memory.upload}
        nodes: list[BoundNode] = []
        for phase in phases:
            offsets = self.engine.buffers[name][phase]
            nodes += _Binder(phase, program.phases[phase], offsets, self.memory, sizes, name, singles).bind(named)
        return Bound(tuple(nodes), named)


def _little_larger(own: Key, other: Key) -> bool:
    """Whether a step had rather be padded to that bucket than wait for its own."""
    return own[0] <= other[0] <= own[0] * NEAR + MARGIN and own[1] <= other[1]


class _Binder:
    """Binds one phase in one bucket."""

    def __init__(
        self,
        name: str,
        phase: Phase,
        offsets: tuple[int, ...],
        memory: Memory,
        sizes: Sizes,
        bucket: str,
        singles: bool,
    ) -> None:
        self.name, self.phase, self.memory, self.sizes, self.bucket = name, phase, memory, sizes, bucket
        self._singles = singles
        self._offsets = iter(offsets)

    def bind(self, named: dict[str, Any]) -> list[BoundNode]:
        """The phase's nodes; its named results are added to `named`."""
        env: dict[Value, Any] = {}
        nodes: list[BoundNode] = []
        for node in self.phase.graph.nodes:
            if node.is_leaf:
                env[node[0]] = self._leaf(node, named)
            else:
                nodes.append(self._node(node, env))
        named.update({name: env[v] for name, v in zip(self.phase.graph.names, self.phase.graph.outputs, strict=True)})
        return nodes

    def _leaf(self, node: Node, named: Mapping[str, Any]) -> Any:
        return {"weight": self.memory.weights, "state": self.memory.states, "input": named}[node.op][node.name]

    def _node(self, node: Node, env: dict[Value, Any]) -> BoundNode:
        aliases = {out: node.inputs[source] for source, out in (get(node.op).writes or {}).items()}
        for value in node.outputs:
            offset = next(self._offsets)
            if value.index in aliases:
                env[value] = env[aliases[value.index]]
            else:
                env[value] = view(self.memory.arena, offset, value.type, self.sizes)
        workspace = self.memory.arena[next(self._offsets) :]
        plan = self.phase.plan(node, self.bucket)
        if self._singles:
            plan = plan.for_singles
        ins, outs = [env[v] for v in node.inputs], [env[v] for v in node.outputs]
        steps = bind(plan, ins, outs, workspace, self.memory.zeroed, self.memory.kernels, self.sizes)
        return BoundNode(self.name, node, plan, tuple(outs), steps)
