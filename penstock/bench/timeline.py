"""A step as a timeline by node: what each moves and multiplies, how far it is from the roof, where the rest goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.engine.program import PLAIN, bucket_name
from penstock.ir.cost import cost, seconds
from penstock.ir.graph import Node
from penstock.ir.ops.fused import matrices
from penstock.kernels.roof import Roof, measure
from penstock.runtime.batch import Batch, Standing
from penstock.runtime.open import Memory, Say, check_match, open_backend
from penstock.runtime.trace import NodeSpan, Trace, trace

REPEATS = 2  # of a run of nodes before it is folded


@dataclass(frozen=True)
class NodeTime:
    """A node in the step. Times in microseconds, as NodeSpan's; `bytes`, `flops`: the least that it moves and
    multiplies; `roof_us`: the least time for them, if either hides behind the other."""

    phase: str
    name: str  # as graph.txt prints it
    op: str
    site: str
    tactic: str
    launches: int
    start_us: float
    busy_us: float
    gap_us: float
    overlap_us: float
    bytes: float
    flops: float
    roof_us: float

    @property
    def share(self) -> float:
        """Of the roof; over 1 where what it reads comes from a cache."""
        return self.roof_us / self.busy_us if self.busy_us else 0.0


@dataclass(frozen=True)
class Timeline:
    """`bucket`: whose memory and kernels the step ran with. `step_us`: the step with nobody looking."""

    batch: Batch
    bucket: str
    nodes: tuple[NodeTime, ...]
    step_us: float
    how: str
    why: str
    roof: Roof

    @property
    def seen_us(self) -> float:
        """The step as it was seen, with what looking costs."""
        return sum(node.busy_us + node.gap_us for node in self.nodes)

    @property
    def roof_us(self) -> float:
        """The sum over the nodes: they run one after another."""
        return sum(node.roof_us for node in self.nodes)

    @property
    def gap_us(self) -> float:
        return sum(node.gap_us for node in self.nodes)

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "batch": asdict(self.batch), "bucket": self.bucket, "timed_by": self.how, "not_better_because": self.why,
            "step_us": self.step_us, "seen_us": self.seen_us, "roof_us": self.roof_us, "gap_us": self.gap_us,
            "lost_us": self.step_us - self.roof_us, "roof": asdict(self.roof),
            "losses": [asdict(loss) for loss in losses(self)],
            "nodes": [{**asdict(node), "share_of_roof": node.share} for node in self.nodes],
        }  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """What all nodes of an op with one tactic take, and how much of it is above their roof. Microseconds."""

    op: str
    tactic: str
    count: int
    busy_us: float
    gap_us: float
    bytes: float
    flops: float
    roof_us: float

    @property
    def lost_us(self) -> float:
        return self.busy_us - self.roof_us

    @property
    def share(self) -> float:
        """Of the roof."""
        return self.roof_us / self.busy_us if self.busy_us else 0.0


def timeline(engine: Engine, directory: Path, batch: Batch, memory: Memory, say: Say) -> Timeline:
    """Open the engine for this batch alone, and look at its step.

    Raises OptionError for a batch that the engine was not built for, EngineMismatch, ResourceError.
    """
    limits = batch.limits(engine.profile)
    check_match(engine)
    roof = Roof(**engine.roof) if engine.roof else measure(engine.device, engine.format)
    backend = open_backend(engine, directory, memory, limits, say)
    try:
        return of_trace(engine, batch, trace(Standing(engine, backend, batch)), roof)
    finally:
        backend.close()


def of_trace(engine: Engine, batch: Batch, seen: Trace, roof: Roof) -> Timeline:
    """What was seen, beside what each node has to move and to multiply."""
    bucket = _bucket(engine, batch)
    numbers = {node: f"%{i}" for phase in _phases(engine) for i, node in enumerate(phase.graph.nodes)}
    nodes = tuple(_node(engine, batch, span, bucket, numbers[span.node], roof) for span in seen.nodes)
    return Timeline(batch, bucket, nodes, seen.step_us, seen.how, seen.why, roof)


def _bucket(engine: Engine, batch: Batch) -> str:
    if engine.device.kind == "cpu":
        return next(iter(engine.profile.unpadded))
    return bucket_name(*engine.profile.bucket(batch.sizes["T"], batch.sizes["L"]))


def _phases(engine: Engine) -> Sequence[Any]:
    return [engine.programs["decode"].phases[name] for name in PLAIN]


def _node(engine: Engine, batch: Batch, span: NodeSpan, bucket: str, name: str, roof: Roof) -> NodeTime:
    phase, node = engine.programs["decode"].phases[span.phase], span.node
    least = cost(node.op, [v.type for v in node.inputs], node.types, node.attrs, _sizes(engine.profile, batch),
                 batch.context)  # fmt: skip
    return NodeTime(
        span.phase, name, node.op, _site(node), phase.plan(node, bucket).tactic, span.launches, span.start, span.busy,
        span.gap, span.overlap, least.bytes, least.flops,
        1e6 * seconds(least, roof.read_bytes_per_s, roof.flops_per_s),
    )  # fmt: skip


def _sizes(profile: Profile, batch: Batch) -> dict[str, int]:
    return {**profile.sizes(batch.sizes["T"], batch.sizes["L"]), **batch.sizes}


def _site(node: Node) -> str:
    """The op, with the matrices that it multiplies by."""
    return " ".join([node.op, *map(str, matrices(node))])


def losses(line: Timeline) -> list[Loss]:
    """By op and tactic, what loses most first."""
    groups: dict[tuple[str, str], list[NodeTime]] = {}
    for node in line.nodes:
        groups.setdefault((node.site, node.tactic.partition("{")[0]), []).append(node)
    found = [
        Loss(
            op, tactic, len(nodes), sum(n.busy_us for n in nodes), sum(n.gap_us for n in nodes),
            sum(n.bytes for n in nodes), sum(n.flops for n in nodes), sum(n.roof_us for n in nodes),
        )
        for (op, tactic), nodes in groups.items()
    ]  # fmt: skip
    return sorted(found, key=lambda loss: -(loss.lost_us + loss.gap_us))


@dataclass(frozen=True, slots=True)
class Run:
    """Nodes that follow each other, `count` times over: [start, start + length) and its repeats."""

    start: int
    length: int
    count: int


def fold(keys: Sequence[object]) -> Iterator[Run]:
    """A sequence as runs: layers that look alike stand once. The shortest run that repeats, as often as it does."""
    at = 0
    while at < len(keys):
        length, count = _repeats(keys, at)
        yield Run(at, length, count)
        at += length * count


def _repeats(keys: Sequence[object], at: int) -> tuple[int, int]:
    for length in range(1, (len(keys) - at) // REPEATS + 1):
        pattern = keys[at : at + length]
        count = 1
        while keys[at + count * length : at + (count + 1) * length] == pattern:
            count += 1
        if count >= REPEATS:
            return length, count
    return 1, 1
