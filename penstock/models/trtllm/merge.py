"""The tensors of all ranks to our weights, as expressions over leaves named `rank0/transformer...`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from penstock.formats import Format, parse
from penstock.ir import Type, Value, leaf
from penstock.models.binding import Binding, shapes
from penstock.models.storage import cut, joined
from penstock.models.trtllm.ranks import FINAL_NORM, HEAD, QKV, TABLE, Ranks, layer_parts, modules, tensor_name
from penstock.spec import AnyNorm, Attention, LayerSpec, ModelSpec, Norm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Merged:
    """Our weights, and the tensors that only repeat one: they must be there, and nothing reads them."""

    binding: Binding
    copies: Binding


@dataclass(frozen=True)
class _Job:
    spec: ModelSpec
    format: Format
    ranks: Ranks
    table_rows: int
    shapes: Mapping[str, Shape]
    copies: dict[str, Value] = field(default_factory=dict)

    def leaf(self, rank: int, name: str, shape: Shape) -> Value:
        return leaf("tensor", f"rank{rank}/{name}", Type(shape, self.format))

    def whole(self, stage: int, name: str, shape: Shape) -> Value:
        """What every rank of a stage has: the first one's is read."""
        first, *others = (self.leaf(stage * self.ranks.tp + r, name, shape) for r in range(self.ranks.tp))
        self.copies.update({other.node.name: other for other in others})
        return first

    def dealt(self, stage: int, name: str, shape: Shape, dim: int) -> Value:
        """Equal parts along `dim`, side by side."""
        part = tuple(size // self.ranks.tp if i == dim else size for i, size in enumerate(shape))
        return joined([self.leaf(stage * self.ranks.tp + r, name, part) for r in range(self.ranks.tp)], dim)


def merge(spec: ModelSpec, format: str, ranks: Ranks, table_rows: int) -> Merged:
    """Every weight of a spec whose norms multiply by what is stored (see `stored_factors`), in `format`.

    table_rows: rows of an embedding that every rank has whole; those behind the vocabulary are cut off.
    """
    job = _Job(spec, parse(format), ranks, table_rows, shapes(spec))
    binding = {"embedding.weight": _table(job)} | dict(_layers(job))
    last = ranks.pp - 1
    binding["final_norm.weight"] = job.whole(last, FINAL_NORM, job.shapes["final_norm.weight"])
    binding["head.weight"] = binding["embedding.weight"] if spec.tied_head else _head(job)
    return Merged(binding, job.copies)


def stored_factors(spec: ModelSpec) -> ModelSpec:
    """The same model with norms that multiply by the stored weight itself: an offset was added when it was written."""
    layers = tuple(_plain_layer(layer) for layer in spec.layers)
    return replace(spec, layers=layers, final_norm=_plain(spec.final_norm))


def tied_copies(spec: ModelSpec) -> tuple[str, ...]:
    """Regular expressions of tensors that a checkpoint may hold beside the weights: a tied head is written too."""
    return (r"rank\d+/lm_head\.weight",) if spec.tied_head else ()


def _plain_layer(layer: LayerSpec) -> LayerSpec:
    assert isinstance(layer.mixer, Attention)
    mixer = replace(layer.mixer, qk_norm=_plain(layer.mixer.qk_norm))
    return replace(
        layer, mixer=mixer, mixer_norm=_plain(layer.mixer_norm), feedforward_norm=_plain(layer.feedforward_norm)
    )


def _plain(norm: AnyNorm | None) -> AnyNorm | None:
    return replace(norm, offset=0.0) if isinstance(norm, Norm) else norm


def _layers(job: _Job) -> Iterator[tuple[str, Value]]:
    parts = layer_parts(job.spec)
    for stage, layers in enumerate(job.ranks.stages(len(parts))):
        for local, layer in enumerate(layers):
            for name, value in _layer(job, stage, f"transformer.layers.{local}", layer, parts[layer]):
                yield f"layers.{layer}.{name}", value


def _layer(job: _Job, stage: int, prefix: str, layer: int, parts: tuple[str, ...]) -> Iterator[tuple[str, Value]]:
    for module, kind in modules(parts):
        shape = job.shapes[f"layers.{layer}.{module}.{kind}"]
        if module in QKV:
            name = f"{prefix}.attention.qkv.{kind}"
            yield f"{module}.{kind}", _of_qkv(job, stage, name, module, shape, _mixer(job, layer))
            continue
        theirs, dim = tensor_name(module, kind)
        name = f"{prefix}.{theirs}"
        whole = dim is None
        yield f"{module}.{kind}", job.whole(stage, name, shape) if whole else job.dealt(stage, name, shape, dim or 0)


def _mixer(job: _Job, layer: int) -> Attention:
    mixer = job.spec.layers[layer].mixer
    assert isinstance(mixer, Attention), mixer
    return mixer


def _of_qkv(job: _Job, stage: int, name: str, module: str, shape: Shape, mixer: Attention) -> Value:
    """The rows of q, of k or of v from every rank's q | k | v; a KV head that several ranks have is read once."""
    tp, size = job.ranks.tp, mixer.head_dim
    q, kv = mixer.heads // tp * size, max(1, mixer.kv_heads // tp) * size
    start, stop = {QKV[0]: (0, q), QKV[1]: (q, q + kv), QKV[2]: (q + kv, q + 2 * kv)}[module]
    step = 1 if module == QKV[0] else max(1, tp // mixer.kv_heads)
    tensors = [job.leaf(stage * tp + r, name, (q + 2 * kv, *shape[1:])) for r in range(0, tp, step)]
    return joined([cut(x, start, stop) for x in tensors], 0)


def _table(job: _Job) -> Value:
    ranks, (rows, width) = job.ranks, job.shapes["embedding.weight"]
    if not ranks.split_table:
        return cut(job.whole(0, TABLE, (job.table_rows, width)), 0, rows)
    if ranks.table_dim == 1:
        return job.dealt(0, TABLE, (rows, width), 1)
    return cut(job.dealt(0, TABLE, (ranks.padded(rows), width), 0), 0, rows)


def _head(job: _Job) -> Value:
    rows, width = job.shapes["head.weight"]
    return cut(job.dealt(job.ranks.pp - 1, HEAD, (job.ranks.padded(rows), width), 0), 0, rows)
