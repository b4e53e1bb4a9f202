"""Weights of the published encoder-decoders; see `dense`."""

from __future__ import annotations

from tests.facts.shapes import Config, Tensors, linear, norm, prefixed, stack


def t5(c: Config) -> Tensors:
    """Each side's first layer has the table of relative distances for all. v1.1 and Flan have a gate and a head."""
    yield "shared.weight", (c["vocab_size"], c["d_model"])
    yield from _t5_side(c, "encoder", c["num_layers"])
    yield from _t5_side(c, "decoder", c.get("num_decoder_layers") or c["num_layers"])
    if not c.get("tie_word_embeddings", True):
        yield "lm_head.weight", (c["vocab_size"], c["d_model"])


def _t5_side(c: Config, side: str, layers: int) -> Tensors:
    E, F = c["d_model"], c["d_ff"]
    gated = c.get("feed_forward_proj", "relu").startswith("gated-")
    mixers = ("SelfAttention", "EncDecAttention") if side == "decoder" else ("SelfAttention",)

    def layer(i: int) -> Tensors:
        for at, mixer in enumerate(mixers):
            yield from _t5_attention(c, f"layer.{at}.{mixer}")
            if i == at == 0:
                yield from _distances(c, f"layer.0.{mixer}")
            yield from norm(f"layer.{at}.layer_norm", E)
        inner = f"layer.{len(mixers)}.DenseReluDense"
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            yield from linear(f"{inner}.{name}", F, E)
        yield from linear(f"{inner}.wo", E, F)
        yield from norm(f"layer.{len(mixers)}.layer_norm", E)

    yield from stack(f"{side}.block", layers, layer)
    yield from norm(f"{side}.final_layer_norm", E)


def _t5_attention(c: Config, name: str) -> Tensors:
    inner = c["num_heads"] * c["d_kv"]
    for part in ("q", "k", "v"):
        yield from linear(f"{name}.{part}", inner, c["d_model"])
    yield from linear(f"{name}.o", c["d_model"], inner)


def _distances(c: Config, name: str) -> Tensors:
    yield f"{name}.relative_attention_bias.weight", (c["relative_attention_num_buckets"], c["num_heads"])


def t5_unused_distances(c: Config) -> Tensors:
    """The first files gave cross attention a table too; it was never used."""
    yield from _distances(c, "decoder.block.0.layer.1.EncDecAttention")


def bart(c: Config) -> Tensors:
    """Files of the model with its head have the prefix `model.`; positions start at row 2."""

    def sides() -> Tensors:
        yield "shared.weight", (c["vocab_size"], c["d_model"])
        yield from _bart_side(c, "encoder", ("self_attn",))
        yield from _bart_side(c, "decoder", ("self_attn", "encoder_attn"))

    yield from prefixed("" if c["architectures"] == ["BartModel"] else "model.", sides())


def _bart_side(c: Config, side: str, mixers: tuple[str, ...]) -> Tensors:
    E, F = c["d_model"], c[f"{side}_ffn_dim"]

    def layer(_: int) -> Tensors:
        for mixer in mixers:
            for part in ("k", "v", "q", "out"):
                yield from linear(f"{mixer}.{part}_proj", E, E, bias=True)
            yield from norm(f"{mixer}_layer_norm", E, bias=True)
        yield from linear("fc1", F, E, bias=True)
        yield from linear("fc2", E, F, bias=True)
        yield from norm("final_layer_norm", E, bias=True)

    yield f"{side}.embed_positions.weight", (c["max_position_embeddings"] + 2, E)
    yield from norm(f"{side}.layernorm_embedding", E, bias=True)
    yield from stack(f"{side}.layers", c[f"{side}_layers"], layer)
