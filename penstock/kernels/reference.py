"""The two tactics that every op has by derivation: its reference, and for a fused op its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from penstock.engine.device import Device
from penstock.engine.program import Arg, Call, Site, Sizes
from penstock.ir.graph import Type, Value
from penstock.ir.op import get, parts_graph
from penstock.kernels.tactic import REFERENCE, Config, Draft, KernelUse, Tactic, whole_call

# Their references read sizes back to the host.
UNCAPTURABLE = (
    "adjust", "attention", "commit", "kv_append", "logprobs", "moe", "prefix_attention", "prepare", "rope_append",
    "rope_attention",
)  # fmt: skip


class Reference(Tactic):
    """The op's own meaning, run by torch: the CPU backend, and on a GPU the last resort."""

    name = REFERENCE

    def __init__(self, op: str) -> None:
        self.op = op

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if device.kind == "cuda" and site.op in UNCAPTURABLE:
            return "the reference reads sizes back to the host and cannot be captured in a CUDA graph"
        return None

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        return Draft((whole_call(REFERENCE, site),))


Choose = Callable[[Site], Draft]


def parts_sites(site: Site) -> tuple[Site, ...]:
    """The sites of the ops that a fused site stands for; weights keep their mark."""
    graph = parts_graph(site.op, site.inputs, site.attrs)
    weights = {str(i) for i in site.weights}
    return tuple(_part_site(node.inputs, Site.of(node), weights) for node in graph.nodes if not node.is_leaf)


def _part_site(values: tuple[Value, ...], site: Site, weights: set[str]) -> Site:
    marked = tuple(i for i, v in enumerate(values) if v.node.is_leaf and v.node.name in weights)
    return replace(site, weights=marked)


def has_parts(op: str) -> bool:
    return get(op).parts is not None


def plan_parts(site: Site, sizes: Sizes, choose: Choose) -> Draft:
    """The derived tactic of a fused op: its parts one after another, intermediates in the workspace.

    `choose` drafts each part with its own best tactic. The parts' own workspace is shared, since they run in order.
    """
    graph = parts_graph(site.op, site.inputs, site.attrs)
    places, scratch = _places(site, sizes)
    steps: list[KernelUse | Call] = []
    drafts = dict(zip((n for n in graph.nodes if not n.is_leaf), map(choose, parts_sites(site)), strict=True))
    for node, draft in drafts.items():
        ins = [places[v] for v in node.inputs]
        outs = [places[v] for v in node.outputs]
        steps.extend(_moved(step, ins, outs, scratch) for step in draft.steps)
    workspace = max((d.workspace for d in drafts.values()), default=0)
    return Draft(tuple(steps), scratch + workspace, max((d.zeroed for d in drafts.values()), default=0))


ALIGN = 256  # bytes; every tensor of a plan starts at a multiple


def _places(site: Site, sizes: Sizes) -> tuple[Mapping[Value, Arg], int]:
    """Where each value of the parts lives, the fused op's own inputs and outputs or the workspace; and its bytes."""
    graph = parts_graph(site.op, site.inputs, site.attrs)
    places: dict[Value, Arg] = {n[0]: Arg("in", int(n.name)) for n in graph.leaves("input")}
    results = {v: i for i, v in enumerate(graph.outputs)}
    offset = 0
    for node in (n for n in graph.nodes if not n.is_leaf):
        aliases = {out: node.inputs[i] for i, out in (get(node.op).writes or {}).items()}
        for value in node.outputs:
            if value.index in aliases:
                places[value] = places[aliases[value.index]]
            elif value in results:
                places[value] = Arg("out", results[value])
            else:
                places[value] = Arg("workspace", offset)
                offset += _aligned(value.type, sizes)
    return places, offset


def _aligned(type: Type, sizes: Sizes) -> int:
    return -(-type.nbytes(sizes) // ALIGN) * ALIGN


def _moved(step: KernelUse | Call, ins: list[Arg], outs: list[Arg], scratch: int) -> KernelUse | Call:
    def move(arg: Arg) -> Arg:
        if arg.kind == "workspace":
            return replace(arg, value=arg.value + scratch)
        return (
            replace({"in": ins, "out": outs}[arg.kind][arg.value], tile=arg.tile) if arg.kind in ("in", "out") else arg
        )

    if isinstance(step, KernelUse):
        return replace(step, args=tuple(map(move, step.args)))
    typed = [tuple((move(a), t) for a, t in pairs) for pairs in (step.inputs, step.outputs)]
    return replace(step, inputs=typed[0], outputs=typed[1])
