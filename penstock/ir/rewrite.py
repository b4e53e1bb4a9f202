"""Rules to fixpoint. A rule looks at one node and says which values replace which; the engine does the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from penstock.errors import PassError
from penstock.ir.graph import Graph, Node, Value

Swap = Mapping[Value, Value]

MAX_SWEEPS = 1000  # far beyond the depth of any nest of expressions
MAX_GROWTH = 10  # times the nodes that rules were given; a rule makes a handful of one


@dataclass(frozen=True, slots=True)
class Match:
    """What a rule may look at: a node in its graph."""

    node: Node
    graph: Graph

    def users(self, value: Value) -> tuple[Node, ...]:
        return self.graph.users.get(value, ())

    def only_user(self, value: Value) -> Node | None:
        """The single reader of a value that is not itself a result of the graph."""
        users = self.users(value)
        return users[0] if len(users) == 1 and value not in self.graph.results else None


Rule = Callable[[Match], Swap | None]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A graph and how often each rule fired."""

    graph: Graph
    fired: Mapping[str, int]


def rewrite(graph: Graph, rules: Sequence[Rule]) -> Rewritten:
    """Apply each rule wherever it fires, until none does.

    Raises PassError where a rule changes the type of what it replaces, and where rules do not come to rest: one
    undoes another, or fires on its own result.
    """
    fired: dict[str, int] = {rule.__name__: 0 for rule in rules}
    most = MAX_GROWTH * (len(graph.nodes) + 100)
    for _ in range(MAX_SWEEPS):
        swaps = dict(_sweep(graph, rules, fired))
        if not swaps:
            return Rewritten(graph, fired)
        graph = substitute(graph, swaps)
        if len(graph.nodes) > most:
            raise PassError(
                f"rules made more than {most} nodes of a graph: {fired}; a rule must not fire on its result"
            )
    raise PassError(f"rules still fire after {MAX_SWEEPS} sweeps over the graph: {fired}; a rule must not fire again")


def _sweep(graph: Graph, rules: Sequence[Rule], fired: dict[str, int]) -> Iterator[tuple[Value, Value]]:
    """The replacements of one pass over the graph; values already touched in it wait for the next."""
    stale: set[Node] = set()
    for node in graph.nodes:
        if node.is_leaf or node in stale or (stale and not stale.isdisjoint([v.node for v in node.inputs])):
            continue
        match = Match(node, graph)
        for rule in rules:
            swap = rule(match)
            if swap and not any(old.node in stale for old in swap):
                for old, new in swap.items():
                    if old.type != new.type:
                        raise PassError(f"{rule.__name__} changed {old.type} to {new.type} at {node.op}; mend the rule")
                    stale.add(old.node)
                    stale.update(graph.users.get(old, ()))
                fired[rule.__name__] += 1
                yield from swap.items()
                break


def substitute(graph: Graph, swaps: Swap) -> Graph:
    """The graph with every use of a replaced value redirected. Replacements may use old values.

    Raises PassError for one that uses what it replaces.
    """
    goals = {value: _goal(value, swaps) for value in swaps}
    touched = {value.node for value in swaps}  # nodes hash by identity: most values need no look-up of their own
    memo: dict[Node, Node] = {}
    waiting: set[Node] = set()

    def redirect(values: Sequence[Value]) -> list[Value]:
        return [goals.get(v, v) if v.node in touched else v for v in values]

    def rebuilt(values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple([v if (new := memo[v.node]) is v.node else Value(new, v.index) for v in values])

    outputs = redirect(graph.outputs)
    stack = [v.node for v in outputs]
    while stack:
        node = stack[-1]
        inputs = redirect(node.inputs)
        if node in memo:
            stack.pop()
        elif missing := [v.node for v in inputs if v.node not in memo]:
            if node in waiting:  # for itself: what it waited for the first time is above it on the stack
                raise PassError(f"a value of {node.op} is replaced by one that reads it; mend the rule")
            waiting.add(node)
            stack.extend(missing)
        else:
            new = rebuilt(inputs)
            memo[node] = node if new == node.inputs else Node(node.op, new, node.attrs, node.types)
            stack.pop()
    return Graph(rebuilt(outputs), graph.names)


def _goal(value: Value, swaps: Swap) -> Value:
    """What a value is replaced by in the end, where replacements are themselves replaced."""
    seen: set[Value] = set()
    while value in swaps and value not in seen:
        seen.add(value)
        value = swaps[value]
    return value
