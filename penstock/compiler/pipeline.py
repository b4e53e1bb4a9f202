"""The ordered list of passes: the only statement of order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock import plugins
from penstock.compiler.passes import (
    align,
    fold,
    fuse_attention,
    fuse_block,
    fuse_glu,
    fuse_norm,
    fuse_qkv,
    fuse_rope,
    sink_rows,
)
from penstock.compiler.passes.share import share
from penstock.compiler.seal import seal, unseal
from penstock.errors import PassError, PluginError
from penstock.ir.dialect import Dialect, built, optimised, verify
from penstock.ir.graph import Graph
from penstock.ir.rewrite import Rewritten, Rule, rewrite


def _never(graph: Graph) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Pass:
    """One step of the pipeline: rules to fixpoint, or a function over the whole graph.

    `dialect` is what the result is verified against. `must` says how often, in all, the pass has to fire on the graph
    handed to it: a fusion that silently stopped matching would cost speed and nobody would know.
    """

    name: str
    body: tuple[Rule, ...] | Callable[[Graph], Rewritten]
    dialect: Callable[[], Dialect] = optimised
    must: Callable[[Graph], int] = _never

    def __call__(self, graph: Graph) -> Rewritten:
        return rewrite(graph, self.body) if isinstance(self.body, tuple) else self.body(graph)


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did."""

    name: str
    fired: Mapping[str, int]  # by rule
    nodes_before: int
    nodes_after: int
    graph: Graph


PASSES: tuple[Pass, ...] = (
    Pass("share", share),  # first, so that "of one value" is a comparison of values
    Pass("fold", fold.RULES),
    Pass("sink_rows", sink_rows.RULES, must=sink_rows.must),
    Pass("share_rows", share),  # two products of one value now pick the same rows of it apart
    Pass("fuse_qkv", fuse_qkv.RULES, must=fuse_qkv.must),
    Pass("fuse_glu", fuse_glu.RULES, must=fuse_glu.must),
    Pass("fuse_norm", fuse_norm.RULES, must=fuse_norm.must),
    Pass("fuse_rope", fuse_rope.RULES, must=fuse_rope.must),
    Pass("fuse_attention", fuse_attention.RULES, must=fuse_attention.must),
    Pass("align", align.RULES, must=align.must),
    Pass("fuse_block", fuse_block.RULES, must=fuse_block.must),  # behind align, which pads plain products
    Pass("join_blocks", fuse_block.JOINS, must=fuse_block.must_join),
    Pass("fold_fused", fold.RULES),  # what fusing and padding left over in weight expressions
    Pass("share_fused", share),
)


_EXTRA: list[tuple[str, Pass]] = []  # the name of a pass, and a plugin's that runs right behind it


def register(step: Pass, after: str) -> None:
    """Run a plugin's pass right behind the pass of that name, and behind those put there before.

    Raises PluginError for a name that is taken, and where there is no pass to follow.
    """
    names = [each.name for each in passes()]
    entry = (after, step)
    plugins.note("pass", step.name, step.name in names, lambda: _EXTRA.remove(entry))
    if after not in names:
        plugins.forget("pass", step.name)
        raise PluginError(f"pass {step.name!r} is to follow {after!r}, and there is none; known are {', '.join(names)}")
    _EXTRA.append(entry)


def passes() -> tuple[Pass, ...]:
    """PASSES, and in their places those of plugins."""
    return tuple(each for step in PASSES for each in _with_followers(step))


def _with_followers(step: Pass) -> Iterator[Pass]:
    yield step
    for after, each in _EXTRA:
        if after == step.name:
            yield from _with_followers(each)


def run(graph: Graph, steps: Sequence[Pass] | None = None) -> tuple[Graph, tuple[PassResult, ...]]:
    """The optimised graph, and what each pass did. `steps` None: ours and those of plugins.

    Raises GraphError where the graph handed in is not a builder's or a pass broke it, PassError where a pass that must
    fire did not.
    """
    graph, held = seal(verify(graph, built()))
    results = []
    for step in passes() if steps is None else steps:
        results.append(_apply(step, graph))
        graph = results[-1].graph
    return unseal(graph, held), tuple(results)


def report(results: Sequence[PassResult]) -> tuple[Mapping[str, Any], ...]:
    """What an engine keeps of it."""
    return tuple({"pass": r.name, "fired": dict(r.fired), "nodes": [r.nodes_before, r.nodes_after]} for r in results)


def _apply(step: Pass, graph: Graph) -> PassResult:
    with plugins.border(("pass", step.name)):
        after = step(graph)
        _check_fired(step, graph, after)
        verify(after.graph, step.dialect())
    return PassResult(step.name, after.fired, len(graph.nodes), len(after.graph.nodes), after.graph)


def _check_fired(step: Pass, graph: Graph, after: Rewritten) -> None:
    need, did = step.must(graph), sum(after.fired.values())
    if did < need:
        raise PassError(
            f"pass {step.name!r} must fire {need} times on this graph and fired {did} times ({dict(after.fired)}); "
            f"the graph handed to it has the pattern, so a rule no longer matches it"
        )
