"""Our weights to the tensors of each rank, as expressions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.formats import parse
from penstock.ir import Node, Type, Value, emit
from penstock.models.binding import Binding
from penstock.models.trtllm.ranks import FINAL_NORM, HEAD, QKV, TABLE, Ranks, layer_parts, modules, tensor_name
from penstock.spec import AnyNorm, Attention, ModelSpec, Norm

PADDED_TABLE = ("LlamaForCausalLM", "MistralForCausalLM")  # whose whole embedding takes the padding of its tied head


@dataclass(frozen=True)
class _Job:
    spec: ModelSpec
    binding: Binding
    exact: Binding
    ranks: Ranks
    pad_table: bool


def split(
    spec: ModelSpec, binding: Binding, exact: Binding, ranks: Ranks, architecture: str
) -> tuple[dict[str, Value], ...]:
    """For each rank its tensors by name.

    `binding`: the weights in the format to be written; `exact`: the same in f32, from which norms are shifted to the
    factors that they stand for, so that these are rounded once.
    """
    pad = architecture in PADDED_TABLE and spec.tied_head
    job = _Job(spec, binding, exact, ranks, pad)
    return tuple(dict(_rank(job, stage, r)) for stage in range(ranks.pp) for r in range(ranks.tp))


def _rank(job: _Job, stage: int, r: int) -> Iterator[tuple[str, Value]]:
    if stage == 0:
        yield TABLE, _table(job, r)
    parts = layer_parts(job.spec)
    for local, layer in enumerate(job.ranks.stages(len(parts))[stage]):
        for name, value in _layer(job, layer, parts[layer], r):
            yield f"transformer.layers.{local}.{name}", value
    if stage == job.ranks.pp - 1:
        yield FINAL_NORM, _factor(job, "final_norm.weight", job.spec.final_norm)
        yield HEAD, _piece(_padded(job.binding["head.weight"], job.ranks), 0, job.ranks.tp, r)


def _layer(job: _Job, layer: int, parts: tuple[str, ...], r: int) -> Iterator[tuple[str, Value]]:
    spec = job.spec.layers[layer]
    assert isinstance(spec.mixer, Attention)
    norms = {"mixer_norm": spec.mixer_norm, "feedforward_norm": spec.feedforward_norm}
    norms |= dict.fromkeys(("attention.q_norm", "attention.k_norm"), spec.mixer.qk_norm or spec.mixer_norm)
    for module, kind in modules(parts):
        name = f"layers.{layer}.{module}.{kind}"
        if module == QKV[0]:
            yield f"attention.qkv.{kind}", _qkv(job, f"layers.{layer}", kind, spec.mixer, r)
        elif module in norms:
            yield tensor_name(module, kind)[0], _factor(job, name, norms[module])
        elif module not in QKV:
            theirs, dim = tensor_name(module, kind)
            yield theirs, _piece(job.binding[name], dim, job.ranks.tp, r)


def _qkv(job: _Job, prefix: str, kind: str, mixer: Attention, r: int) -> Value:
    q, k, v = (job.binding[f"{prefix}.{module}.{kind}"] for module in QKV)
    tp = job.ranks.tp
    if mixer.kv_heads >= tp:
        return emit("concat", *(_piece(x, 0, tp, r) for x in (q, k, v)), dim=0)[0]
    head = job.ranks.head_of(r, mixer.kv_heads)
    kv = (_piece(x, 0, mixer.kv_heads, head) for x in (k, v))
    return emit("concat", _piece(q, 0, tp, r), *kv, dim=0)[0]


def _table(job: _Job, r: int) -> Value:
    table, ranks = job.binding["embedding.weight"], job.ranks
    if ranks.split_table:
        return _piece(_padded(table, ranks), 0, ranks.tp, r)
    return _padded(table, ranks) if job.pad_table else table


def _factor(job: _Job, name: str, norm: AnyNorm | None) -> Value:
    """A norm as the factor that it multiplies by: stored weight + offset."""
    if not isinstance(norm, Norm) or norm.offset == 0.0:
        return job.binding[name]
    type = Type(job.binding[name].type.shape, parse(job.binding[name].type.format.name))
    return Node("shift", (job.exact[name],), (("value", norm.offset),), (type,))[0]  # born in the format written


def _piece(x: Value, dim: int | None, count: int, index: int) -> Value:
    if dim is None or count == 1:
        return x
    size = int(x.type.shape[dim]) // count
    return emit("slice", x, dim=dim, start=index * size, stop=(index + 1) * size)[0]


def _padded(table: Value, ranks: Ranks) -> Value:
    rows = int(table.type.shape[0])
    return table if rows == ranks.padded(rows) else emit("pad", table, dim=0, size=ranks.padded(rows))[0]
