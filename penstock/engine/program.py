"""Programs: graphs with the launches chosen for them. Plain data, so that another runtime could run them.

A program has phases, run one after another in every step, each with its own graph. Every node has a *site* (op, types,
attributes); equal sites share one plan per bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from penstock.ir.graph import Attr, Graph, Node, Type, freeze
from penstock.ir.text import graph_from_json, graph_to_json, parse_type

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Site:
    """What a tactic is chosen for: an op on types with attributes. Left out of identity: where in the graph it stands.

    `weights` are the indices of inputs that are weights, whose layout the tactic may choose.
    """

    op: str
    inputs: tuple[Type, ...]
    outputs: tuple[Type, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    weights: tuple[int, ...] = ()

    @staticmethod
    def of(node: Node) -> Site:
        weights = tuple(i for i, v in enumerate(node.inputs) if v.node.op == "weight")
        return Site(node.op, tuple(v.type for v in node.inputs), node.types, node.attrs, weights)

    def attr(self, name: str, default: Any = None) -> Any:
        return dict(self.attrs).get(name, default)

    @cached_property
    def key(self) -> str:
        """Readable and unique: the name under which plans and timings are stored."""
        operands = ", ".join(f"{t}{'!' if i in self.weights else ''}" for i, t in enumerate(self.inputs))
        attrs = f" {json.dumps(dict(self.attrs))}" if self.attrs else ""
        return f"{self.op}({operands}){attrs} : {', '.join(map(str, self.outputs))}"


@dataclass(frozen=True, slots=True)
class Tile:
    """How the copy engine of Hopper and later (TMA) reads a row-major matrix: box by box, zeros beyond its edges.

    A row of a box has 128 bytes and arrives in the 128-byte swizzle. With `turns` the matrix is two halves of rows,
    one above the other, of which a box has eight rows each in turn; the map has dimensions column, row of eight, half,
    and eight.
    """

    format: str  # "bf16" | "f16"
    shape: tuple[int, int]  # of the matrix
    box: tuple[int, int]
    turns: bool = False


@dataclass(frozen=True, slots=True)
class Arg:
    """One kernel argument: input i, output i, byte offset into the workspace or the zeroed memory, or an integer.

    With a `tile` the argument is not the pointer but a tensor map of the matrix that starts there.
    """

    kind: str  # "in" | "out" | "workspace" | "zeroed" | "int"
    value: int
    tile: Tile | None = None


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """A stored kernel, its grid and its arguments."""

    kernel: str  # key into the engine's kernels
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]
    dependent: bool = True  # programmatic dependent launch: the kernel waits by itself for what it reads
    cooperative: bool = False  # its blocks wait for each other: all are resident at once, or the launch fails
    singles: bool = True  # False: where every row of a step is a single token, it has nothing to do and is left out


@dataclass(frozen=True)
class Call:
    """A named function of the runtime on tensors: a library's product, or an op's reference."""

    name: str
    op: str
    attrs: tuple[tuple[str, Attr], ...]
    inputs: tuple[tuple[Arg, Type], ...]
    outputs: tuple[tuple[Arg, Type], ...]

    @cached_property
    def node(self) -> Node:
        """The node that the call stands for. Its inputs are handed in, so it has none."""
        return Node(self.op, (), self.attrs, tuple(t for _, t in self.outputs))


Launch = KernelLaunch | Call

DECODE: Final = "decode"  # the program of every engine: a step
ENCODE: Final = "encode"  # of those with an encoder: a run of it, which has the phases of FRONT alone

# The phases of a decode step. Its tail is another where a row asks for more than a token: see `compiler.phases`.
FRONT: Final = ("prepare", "forward")
TAIL: Final = "sample"
CONTROLLED_TAIL: Final = "controlled"
PLAIN: Final = (*FRONT, TAIL)
SCORES: Final = ("top_ids", "top_values", "chosen")  # what that tail gives beside the tokens
CONTROLLED: Final = (*FRONT, CONTROLLED_TAIL)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one site runs in one bucket.

    `zeroed` bytes are zero when a plan starts and zero again when it ends. All plans share them: launches of a step run
    in order, and one that starts before its predecessor has ended touches them only after it has waited for it.
    """

    tactic: str
    launches: tuple[Launch, ...]
    workspace: int = 0  # bytes
    zeroed: int = 0  # bytes

    @property
    def for_singles(self) -> Plan:
        """The plan of a step in which every row is a single token; this one where nothing can be left out."""
        launches = tuple(x for x in self.launches if isinstance(x, Call) or x.singles)
        return self if len(launches) == len(self.launches) else replace(self, launches=launches)


@dataclass(frozen=True)
class Phase:
    """One graph of a program and, by site key and bucket, its plans.

    `plans[site key][bucket]` says how the site runs there.
    """

    graph: Graph
    plans: Mapping[str, Mapping[str, Plan]] = field(default_factory=dict)

    @cached_property
    def _keys(self) -> Mapping[Node, str]:
        """Printing a site costs more than finding its plan, and every bucket asks for every node's."""
        return {node: Site.of(node).key for node in self.graph.nodes if not node.is_leaf}

    @property
    def sites(self) -> frozenset[str]:
        """Keys of all that the graph computes."""
        return frozenset(self._keys.values())

    def plan(self, node: Node, bucket: str) -> Plan:
        """How a node of the graph runs in a bucket."""
        return self.plans[self._keys[node]][bucket]


@dataclass(frozen=True)
class Program:
    """Named phases in the order a step runs them, and the buckets they are planned for."""

    phases: Mapping[str, Phase]
    buckets: Mapping[str, Sizes]

    @cached_property
    def zeroed(self) -> int:
        """Bytes that are zero whenever a plan starts: the most that any plan asks for."""
        sites = (by_bucket for phase in self.phases.values() for by_bucket in phase.plans.values())
        return max((plan.zeroed for by_bucket in sites for plan in by_bucket.values()), default=0)


def site_to_json(site: Site) -> dict[str, Any]:
    return {
        "op": site.op,
        "inputs": [str(t) for t in site.inputs],
        "outputs": [str(t) for t in site.outputs],
        "attrs": dict(site.attrs),
        "weights": list(site.weights),
    }


def site_from_json(data: Mapping[str, Any]) -> Site:
    attrs = tuple(sorted((k, freeze(v)) for k, v in data["attrs"].items()))
    types = [tuple(parse_type(t) for t in data[side]) for side in ("inputs", "outputs")]
    return Site(data["op"], types[0], types[1], attrs, tuple(data["weights"]))


def bucket_name(tokens: int, logits: int) -> str:
    """The name of the bucket of T tokens and L logit rows."""
    return f"T{tokens}.L{logits}"


def encoder_bucket(tokens: int) -> str:
    """The same of an encoder's run."""
    return f"{ENCODE}.T{tokens}"


def program_to_json(program: Program) -> dict[str, Any]:
    return {
        "buckets": {name: dict(sizes) for name, sizes in program.buckets.items()},
        "phases": {name: _phase_to_json(phase) for name, phase in program.phases.items()},
    }


def program_from_json(data: Mapping[str, Any]) -> Program:
    return Program(
        {name: _phase_from_json(phase) for name, phase in data["phases"].items()},
        {name: dict(sizes) for name, sizes in data["buckets"].items()},
    )


def _phase_to_json(phase: Phase) -> dict[str, Any]:
    """Plans that several buckets share are stored once."""
    store: dict[str, Any] = {}
    sites: dict[str, dict[str, str]] = {}
    for site, by_bucket in phase.plans.items():
        for bucket, plan in by_bucket.items():
            data = plan_to_json(plan)
            key = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:12]
            store[key] = data
            sites.setdefault(site, {})[bucket] = key
    return {"graph": graph_to_json(phase.graph), "sites": sites, "plans": store}


def _phase_from_json(data: Mapping[str, Any]) -> Phase:
    plans = {key: plan_from_json(plan) for key, plan in data["plans"].items()}
    sites = {site: {b: plans[key] for b, key in by_bucket.items()} for site, by_bucket in data["sites"].items()}
    return Phase(graph_from_json(data["graph"]), sites)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    launches = [_launch_to_json(launch) for launch in plan.launches]
    return {"tactic": plan.tactic, "workspace": plan.workspace, "zeroed": plan.zeroed, "launches": launches}


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    launches = tuple(_launch_from_json(x) for x in data["launches"])
    return Plan(data["tactic"], launches, data["workspace"], data["zeroed"])


def _launch_to_json(launch: Launch) -> dict[str, Any]:
    if isinstance(launch, KernelLaunch):
        args = [_arg_to_json(a) for a in launch.args]
        how = {"dependent": launch.dependent, "cooperative": launch.cooperative, "singles": launch.singles}
        return {"kernel": launch.kernel, "grid": list(launch.grid), "args": args, **how}
    return {
        "call": launch.name,
        "op": launch.op,
        "attrs": dict(launch.attrs),
        "inputs": [[a.kind, a.value, str(t)] for a, t in launch.inputs],
        "outputs": [[a.kind, a.value, str(t)] for a, t in launch.outputs],
    }


def _launch_from_json(data: Mapping[str, Any]) -> Launch:
    if "kernel" in data:
        args = tuple(_arg_from_json(*item) for item in data["args"])
        grid = data["grid"]
        how = data["dependent"], data["cooperative"], data["singles"]
        return KernelLaunch(data["kernel"], (grid[0], grid[1], grid[2]), args, *how)
    attrs = tuple(sorted((k, freeze(v)) for k, v in data["attrs"].items()))
    return Call(data["call"], data["op"], attrs, _typed(data["inputs"]), _typed(data["outputs"]))


def _arg_to_json(arg: Arg) -> list[Any]:
    return [arg.kind, arg.value, *([asdict(arg.tile)] if arg.tile else [])]


def _arg_from_json(kind: str, value: int, tile: Mapping[str, Any] | None = None) -> Arg:
    if tile is None:
        return Arg(kind, value)
    (rows, columns), (height, width) = tile["shape"], tile["box"]
    return Arg(kind, value, Tile(tile["format"], (rows, columns), (height, width), tile["turns"]))


def _typed(items: list[list[Any]]) -> tuple[tuple[Arg, Type], ...]:
    return tuple((Arg(kind, value), parse_type(text)) for kind, value, text in items)
