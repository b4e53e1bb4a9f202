"""Each folding rule, and what it must leave alone."""

from __future__ import annotations

import pytest

from penstock.compiler.passes.fold import RULES
from penstock.ir import Graph, Value, emit
from penstock.ir.rewrite import rewrite
from tests.null.passes.graphs import counts, graph, value, weight

A, B, X = weight("a", 4, 8), weight("b", 2, 8), value("x", 8)


def one(op: str, *inputs: Value, **attrs: object) -> Value:
    return emit(op, *inputs, **attrs)[0]


def cut(x: Value, start: int, stop: int, dim: int = 0) -> Value:
    return one("slice", x, dim=dim, start=start, stop=stop)


AB = one("concat", A, B, dim=0)

FOLDED: dict[str, tuple[Value, Value]] = {
    "slice of all": (cut(A, 0, 4), A),
    "slice of slice": (cut(cut(A, 1, 4), 1, 2), cut(A, 2, 3)),
    "slice of one part": (cut(AB, 4, 6), B),
    "slice within a part": (cut(AB, 5, 6), cut(B, 1, 2)),
    "slice of a pad's own part": (cut(one("pad", A, dim=0, size=8), 1, 3), cut(A, 1, 3)),
    "concat of one": (one("concat", A, dim=0), A),
    "concat of concats": (one("concat", B, AB, dim=0), one("concat", B, A, B, dim=0)),
    "a fused tensor cut and joined": (one("concat", cut(A, 0, 1), cut(A, 1, 3), cut(A, 3, 4), dim=0), A),
    "pad to the same size": (one("pad", A, dim=1, size=8), A),
    "pad of pad": (one("pad", one("pad", A, dim=1, size=9), dim=1, size=16), one("pad", A, dim=1, size=16)),
    "transpose twice": (one("transpose", one("transpose", A)), A),
    "reshape of reshape": (one("reshape", one("reshape", A, shape=(32,)), shape=(4, 8)), A),
    "shift by nothing": (one("shift", A, value=0.0), A),
    "scale by one": (one("scale", X, factor=1.0), X),
    "narrow to all": (one("narrow", X, size=8), X),
    "narrow of narrow": (one("narrow", one("narrow", X, size=7), size=5), one("narrow", X, size=5)),
    "split in one": (one("split", X, sizes=(8,)), X),
    "split, one part read": (
        emit("split", one("linear", X, AB), sizes=(4, 2))[1],
        one("linear", X, B),
    ),
}

LEFT = {
    "slice over two parts": cut(AB, 3, 5),
    "slice along another dimension": cut(AB, 0, 4, dim=1),
    "slice into a pad's zeros": cut(one("pad", A, dim=0, size=8), 3, 5),
    "pads along two dimensions": one("pad", one("pad", A, dim=1, size=9), dim=0, size=8),
    "slices with a gap": one("concat", cut(A, 0, 1), cut(A, 2, 4), dim=0),
    "slices in another order": one("concat", cut(A, 2, 4), cut(A, 0, 2), dim=0),
    "slices of different tensors": one("concat", cut(A, 0, 1), cut(B, 1, 2), dim=0),
    "one transpose of a square": one("transpose", weight("square", 3, 3)),
    "scale": one("scale", X, factor=0.5),
    "shift": one("shift", A, value=1.0),
    "a padded product cut": one("narrow", one("linear", X, one("pad", A, dim=0, size=8)), size=4),
}


def fold(g: Graph) -> Graph:
    return rewrite(g, RULES).graph


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str) -> None:
    before, after = FOLDED[case]
    assert str(fold(graph(before))) == str(graph(after))


@pytest.mark.parametrize("case", LEFT)
def test_leaves(case: str) -> None:
    before = graph(LEFT[case])
    assert str(fold(before)) == str(before)


def test_a_product_that_others_read_is_not_cut() -> None:
    whole = one("linear", X, AB)
    assert counts(fold(graph(whole, emit("split", whole, sizes=(4, 2))[1])))["split"] == 1


def test_a_split_of_which_two_parts_are_read_stays() -> None:
    parts = emit("split", one("linear", X, AB), sizes=(1, 3, 2))
    assert counts(fold(graph(parts[0], parts[2])))["split"] == 1


def test_every_rule_is_tested() -> None:
    fired = [rewrite(graph(before), RULES).fired for before, _ in FOLDED.values()]
    assert {name for f in fired for name, n in f.items() if n} == {rule.__name__ for rule in RULES}
