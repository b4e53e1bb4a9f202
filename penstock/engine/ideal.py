"""How long a step takes at best: the longer of its bytes and its operations, at the device's own rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from penstock.engine.manifest import Engine
from penstock.ir.cost import cost, seen
from penstock.ir.graph import Node
from penstock.ir.op import get, parts_graph


class AttentionCost:
    """Operations of one sequence's attention over all layers; the graph is read once, and an answer costs little."""

    def __init__(self, engine: Engine) -> None:
        graph, sizes = engine.programs["decode"].phases["forward"].graph, {**engine.profile.sizes(1, 1), "S": 1}
        self._pair: Counter[int] = Counter()  # by window, operations for each pair of a query and a key
        for node in _attentions(graph.nodes):
            pair = cost(node.op, [v.type for v in node.inputs], node.types, node.attrs, sizes, 0).flops
            self._pair[int(str(dict(node.attrs).get("window", 0)))] += int(pair)

    def flops(self, queries: int, context: int) -> float:
        """Of consecutive queries behind `context` tokens."""
        return float(sum([pair * seen(queries, context, window) for window, pair in self._pair.items()]))


def _attentions(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every attention of a graph, those inside fused ops too."""
    for node in nodes:
        if node.op == "attention":
            yield node
        elif get(node.op).parts if not node.is_leaf else False:
            yield from _attentions(parts_graph(node.op, tuple(v.type for v in node.inputs), node.attrs).nodes)


class StepRoof:
    """The least time of one step: weights read once, each row's KV, and the operations of every token and logit row.

    Bytes and operations hide behind each other. A prefix that several rows share counts for each, an encoder's run for
    nothing.
    """

    def __init__(self, engine: Engine) -> None:
        """The engine's `roof` is known."""
        self._engine, self._work, self._attention = engine, engine.work, AttentionCost(engine)
        self._read, self._multiplied = engine.roof["read_bytes_per_s"], engine.roof["flops_per_s"]

    def seconds(self, rows: int, context: int, chunks: Iterable[tuple[int, int]], logits: int) -> float:
        """Of `rows` with one token each behind `context` tokens in all, and chunks of (tokens, context)."""
        work, tokens, kept = self._work, rows, context + rows
        scores = rows * self._attention.flops(1, context // rows) if rows else 0.0
        for queries, before in chunks:
            tokens, kept = tokens + queries, kept + before + queries
            scores += self._attention.flops(queries, before)
        read = self._engine.step_bytes(tokens) + kept * work["kv_bytes_per_token"]
        operations = tokens * work["flops_per_token"] + logits * work["flops_per_logit"] + scores
        return max(read / self._read, operations / self._multiplied)
