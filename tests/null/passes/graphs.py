"""Shorthands for small graphs, and random ones."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st

from penstock.ir import Graph, Value, emit, leaf, tensor


def weight(name: str, *shape: int, format: str = "f32") -> Value:
    return leaf("tensor", name, tensor(format, *shape))


def value(name: str, width: int, format: str = "f32") -> Value:
    return leaf("input", name, tensor(format, "T", width))


def graph(*outputs: Value) -> Graph:
    return Graph(outputs, tuple(f"y{i}" for i in range(len(outputs))))


def counts(graph: Graph) -> Counter[str]:
    return Counter(n.op for n in graph.nodes if not n.is_leaf)


WIDTHS = (1, 3, 8, 12)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Row-wise graphs of what feed-forwards are made of, odd sizes included, results drawn from anywhere."""
    pool: list[Value] = [value("x", draw(st.sampled_from(WIDTHS))), value("y", 8)]
    weights: list[Value] = []
    for _ in range(draw(st.integers(1, 14))):
        pool.extend(draw(st.sampled_from(STEPS))(draw, pool, weights))
    chosen = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4, unique=True))
    rows = leaf("input", "rows", tensor("i32", "L"))
    return graph(*(emit("take_rows", v, rows)[0] if draw(st.booleans()) else v for v in chosen))


def _any(draw: st.DrawFn, pool: list[Value]) -> Value:
    return draw(st.sampled_from(pool[-6:]))


def _width(v: Value) -> int:
    return int(v.type.shape[-1])


def _matrix(draw: st.DrawFn, weights: list[Value], rows: int, columns: int) -> Value:
    """A tensor, or an expression that has its shape."""
    same = [w for w in weights if w.type.shape == (rows, columns)]
    if same and draw(st.booleans()):
        return same[0]
    new = weight(f"w{len(weights)}", rows, columns)
    weights.append(new)
    match draw(st.integers(0, 5)):
        case 0:
            taller = emit("pad", new, dim=0, size=rows + 2)[0]
            return emit("slice", taller, dim=0, start=0, stop=rows)[0]
        case 1 if rows > 1:
            parts = [emit("slice", new, dim=0, start=a, stop=b)[0] for a, b in ((0, 1), (1, rows))]
            return emit("concat", *parts, dim=0)[0]
        case 2:
            return emit("transpose", emit("transpose", new)[0])[0]
        case 3 if columns > 1:
            kept = emit("slice", new, dim=1, start=0, stop=columns - 1)[0]
            return emit("pad", kept, dim=1, size=columns)[0]
    return new


def _linear(draw: st.DrawFn, pool: list[Value], weights: list[Value]) -> list[Value]:
    x, rows = _any(draw, pool), draw(st.sampled_from(WIDTHS))
    return [_one_linear(draw, x, rows, draw(st.booleans()), weights)]


def _one_linear(draw: st.DrawFn, x: Value, rows: int, bias: bool, weights: list[Value]) -> Value:
    extra = ()
    if bias:
        extra = (weight(f"w{len(weights)}", rows),)
        weights.append(extra[0])
    return emit("linear", x, _matrix(draw, weights, rows, _width(x)), *extra)[0]


def _gated(draw: st.DrawFn, pool: list[Value], weights: list[Value]) -> list[Value]:
    x, rows, bias = _any(draw, pool), draw(st.sampled_from(WIDTHS)), draw(st.booleans())
    gate, up = (_one_linear(draw, x, rows, bias, weights) for _ in range(2))
    y = emit("glu", gate, up, act=draw(st.sampled_from(("silu", "gelu", "relu"))))[0]
    return draw(st.sampled_from(([y], [gate, y])))


def _add(draw: st.DrawFn, pool: list[Value], weights: list[Value]) -> list[Value]:
    x = _any(draw, pool)
    total = emit("add", x, draw(st.sampled_from([v for v in pool if v.type == x.type])))[0]
    w = weight(f"w{len(weights)}", _width(x))
    weights.append(w)
    if draw(st.booleans()):
        return [total, emit("rms_norm", total, w, eps=1e-5, offset=0.5)[0]]
    return [total, emit("layer_norm", total, w, *([w] if draw(st.booleans()) else []), eps=1e-3)[0]]


def _cut(draw: st.DrawFn, pool: list[Value], weights: list[Value]) -> list[Value]:
    x = _any(draw, pool)
    at = draw(st.integers(1, _width(x)))
    if at == _width(x) or draw(st.booleans()):
        return [emit("narrow", x, size=at)[0]]
    return list(emit("split", x, sizes=(at, _width(x) - at)).outputs)


def _scaled(draw: st.DrawFn, pool: list[Value], weights: list[Value]) -> list[Value]:
    """One of the ops element by element."""
    ops = (("scale", {"factor": 1.0}), ("scale", {"factor": 0.5}), ("clip", {"limit": 0.7}), ("softcap", {"cap": 2.0}))
    op, attrs = draw(st.sampled_from((*ops, ("activate", {"act": "relu2"}), ("activate", {"act": "gelu"}))))
    return [emit(op, _any(draw, pool), **attrs)[0]]


STEPS = (_linear, _gated, _add, _cut, _scaled)
