"""Tensors of Hugging Face's layouts as expressions over Megatron's shards.

A tensor rank has its share of the rows of linear_qkv and linear_fc1 and of the vocabulary, its share of the columns of
linear_proj and linear_fc2, and the norms and other biases whole. The rows of linear_qkv go by KV head: its query heads,
its key, its value. A gated linear_fc1 has the gate's rows of the rank, then those that it gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from penstock.errors import CheckpointError
from penstock.formats import parse
from penstock.ir import Type, Value, emit, leaf
from penstock.models.foreign.facts import Facts
from penstock.models.foreign.shards import Shards, shard_name
from penstock.models.storage import by_group, cut, joined

_TABLE, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
Named = Iterator[tuple[str, Value]]


@dataclass(frozen=True)
class Merged:
    """The tensors, and those shards that only repeat one: they must be there, and nothing reads them."""

    tensors: dict[str, Value]
    copies: dict[str, Value]


@dataclass(frozen=True)
class _Job:
    facts: Facts
    shards: Shards
    format: str
    copies: dict[str, Value] = field(default_factory=dict)

    def leaf(self, rank: int, stage: int, name: str, *shape: int) -> Value:
        return leaf("tensor", shard_name(rank, stage, name), Type(shape, parse(self.format)))

    def parts(self, stage: int, name: str, *shape: int) -> list[Value]:
        """One from each tensor rank, all of this shape."""
        return [self.leaf(rank, stage, name, *shape) for rank in range(self.shards.tp)]

    def whole(self, stage: int, name: str, *shape: int) -> Value:
        """What every tensor rank has: the first one's is read."""
        first, *others = self.parts(stage, name, *shape)
        self.copies.update({other.node.name: other for other in others})
        return first

    def norm(self, stage: int, name: str, size: int) -> Value:
        value = self.whole(stage, name, size)
        one_added = self.facts.one_added and name.endswith("weight")
        return emit("shift", value, value=1.0)[0] if one_added else value

    def table(self, stage: int, name: str) -> Value:
        """The vocabulary's rows; what lies behind them makes the shards equal."""
        rows = self.shards.rows(stage, name)
        if rows * self.shards.tp < self.facts.vocab:
            held = f"{name} has {rows} rows on each of {self.shards.tp} ranks"
            raise CheckpointError(f"{held}, but the settings say vocab_size = {self.facts.vocab}; correct it")
        return cut(joined(self.parts(stage, name, rows, self.facts.hidden), 0), 0, self.facts.vocab)

    def qkv(self, layer: int, kind: str) -> tuple[Value, Value, Value]:
        """q, k and v, the heads of each one after the other."""
        groups, size = self.facts.groups // self.shards.tp, self.facts.head_dim
        sizes = (self.facts.heads // self.facts.groups * size, size, size)
        parts = self.fused_qkv(layer, kind)
        q, k, v = (joined([by_group(x, groups, sizes, i) for x in parts], 0) for i in range(3))
        return q, k, v

    def fused_qkv(self, layer: int, kind: str) -> list[Value]:
        facts, tp = self.facts, self.shards.tp
        rows = facts.groups // tp * (facts.heads // facts.groups + 2) * facts.head_dim
        name = f"decoder.layers.{layer}.self_attention.linear_qkv.{kind}"
        return self.parts(self.shards.stage_of(layer), name, rows, *self.columns(kind))

    def columns(self, kind: str) -> tuple[int, ...]:
        return (self.facts.hidden,) if kind == "weight" else ()

    def dealt(self, layer: int, name: str, rows: int, columns: int) -> Value:
        """A matrix of which each tensor rank has a share of the columns."""
        stage = self.shards.stage_of(layer)
        return joined(self.parts(stage, f"decoder.layers.{layer}.{name}", rows, columns // self.shards.tp), 1)

    def fc1(self, layer: int, kind: str) -> list[Value]:
        share = self.facts.ffn // self.shards.tp * (2 if self.facts.gated else 1)
        name = f"decoder.layers.{layer}.mlp.linear_fc1.{kind}"
        return self.parts(self.shards.stage_of(layer), name, share, *self.columns(kind))

    def of_layer(self, layer: int, name: str, size: int) -> Value:
        return self.norm(self.shards.stage_of(layer), f"decoder.layers.{layer}.{name}", size)


def expressions(facts: Facts, model_type: str, shards: Shards, format: str) -> Merged:
    """Every tensor of a Hugging Face checkpoint of these facts, read in `format`. Raises CheckpointError."""
    job = _Job(facts, shards, format)
    make: Callable[[_Job], Named] = {"gpt2": _gpt2, "gpt_neox": _neox}.get(model_type, _llama)
    return Merged(dict(make(job)), job.copies | dict(_repeated_tables(job)))


def _repeated_tables(job: _Job) -> Named:
    """A tied head is kept by the last stage too, and some write it beside the embedding."""
    last = job.shards.pp - 1
    for name in (_HEAD, _TABLE):
        if (job.facts.tied and name == _HEAD and job.shards.has(last, name)) or (
            name == _TABLE and last and job.facts.tied and job.shards.has(last, name)
        ):
            rows = job.shards.rows(0, _TABLE)
            yield from ((x.node.name, x) for x in job.parts(last, name, rows, job.facts.hidden))


def _ends(job: _Job, table: str, norm: str, head: str, kinds: tuple[str, ...]) -> Named:
    last = job.shards.pp - 1
    yield table, job.table(0, _TABLE)
    for kind in kinds:
        yield f"{norm}.{kind}", job.norm(last, f"decoder.final_norm.{kind}", job.facts.hidden)
    if not job.facts.tied:
        yield head, job.table(last, _HEAD)


def _llama(job: _Job) -> Named:
    facts = job.facts
    yield from _ends(job, "model.embed_tokens.weight", "model.norm", "lm_head.weight", ("weight",))
    for layer in range(facts.layers):
        own = f"model.layers.{layer}"
        yield f"{own}.input_layernorm.weight", job.of_layer(layer, "mixer_norm.weight", facts.hidden)
        yield f"{own}.post_attention_layernorm.weight", job.of_layer(layer, "feedforward_norm.weight", facts.hidden)
        for kind in ("weight", "bias") if facts.qkv_bias else ("weight",):
            for part, value in zip("qkv", job.qkv(layer, kind), strict=True):
                yield f"{own}.self_attn.{part}_proj.{kind}", value
        width = facts.heads * facts.head_dim
        yield (
            f"{own}.self_attn.o_proj.weight",
            job.dealt(layer, "self_attention.linear_proj.weight", facts.hidden, width),
        )
        yield f"{own}.mlp.down_proj.weight", job.dealt(layer, "mlp.linear_fc2.weight", facts.hidden, facts.ffn)
        if facts.qk_norm:
            for part in "qk":
                name = f"self_attention.{part}_layernorm.weight"
                yield f"{own}.self_attn.{part}_norm.weight", job.of_layer(layer, name, facts.head_dim)
        for kind in ("weight", "bias") if facts.bias else ("weight",):
            parts, half = job.fc1(layer, kind), facts.ffn // job.shards.tp
            yield f"{own}.mlp.gate_proj.{kind}", joined([cut(x, 0, half) for x in parts], 0)
            yield f"{own}.mlp.up_proj.{kind}", joined([cut(x, half, 2 * half) for x in parts], 0)
        if facts.bias:
            yield f"{own}.self_attn.o_proj.bias", _bias(job, layer, "self_attention.linear_proj")
            yield f"{own}.mlp.down_proj.bias", _bias(job, layer, "mlp.linear_fc2")


def _gpt2(job: _Job) -> Named:
    """Its matrices multiply from the right, and q, k and v are one."""
    yield from _ends(job, "transformer.wte.weight", "transformer.ln_f", "lm_head.weight", ("weight", "bias"))
    places = job.whole(0, "embedding.position_embeddings.weight", job.facts.positions, job.facts.hidden)
    yield "transformer.wpe.weight", places
    for layer in range(job.facts.layers):
        qkv = {kind: joined(list(job.qkv(layer, kind)), 0) for kind in ("weight", "bias")}
        for name, value in _classic(
            job, layer, qkv, ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ):
            flipped = len(value.type.shape) == 2
            yield f"transformer.h.{layer}.{name}", emit("transpose", value)[0] if flipped else value


def _neox(job: _Job) -> Named:
    """Its q, k and v are one, by head, as Megatron's are where every head has its own."""
    names = ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense",
             "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")  # fmt: skip
    yield from _ends(
        job, "gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight", ("weight", "bias")
    )
    for layer in range(job.facts.layers):
        qkv = {kind: joined(job.fused_qkv(layer, kind), 0) for kind in ("weight", "bias")}
        for name, value in _classic(job, layer, qkv, names):
            yield f"gpt_neox.layers.{layer}.{name}", value


def _classic(job: _Job, layer: int, qkv: dict[str, Value], names: tuple[str, ...]) -> Named:
    """A layer with LayerNorms, biases, and a feed-forward without a gate."""
    facts, (norm1, norm2, attention, out, up, down) = job.facts, names
    for kind in ("weight", "bias"):
        yield f"{norm1}.{kind}", job.of_layer(layer, f"mixer_norm.{kind}", facts.hidden)
        yield f"{norm2}.{kind}", job.of_layer(layer, f"feedforward_norm.{kind}", facts.hidden)
        yield f"{attention}.{kind}", qkv[kind]
        yield f"{up}.{kind}", joined(job.fc1(layer, kind), 0)
    width = facts.heads * facts.head_dim
    yield f"{out}.weight", job.dealt(layer, "self_attention.linear_proj.weight", facts.hidden, width)
    yield f"{down}.weight", job.dealt(layer, "mlp.linear_fc2.weight", facts.hidden, facts.ffn)
    yield f"{out}.bias", _bias(job, layer, "self_attention.linear_proj")
    yield f"{down}.bias", _bias(job, layer, "mlp.linear_fc2")


def _bias(job: _Job, layer: int, module: str) -> Value:
    return job.whole(job.shards.stage_of(layer), f"decoder.layers.{layer}.{module}.bias", job.facts.hidden)
