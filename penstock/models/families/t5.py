"""T5, T5 v1.1 and Flan: an encoder and a decoder with relative biases on unscaled scores. (Raffel et al. 2020.)"""

from __future__ import annotations

from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import MAX_HEAD_DIM, MAX_LAYERS
from penstock.models.registry import Family
from penstock.spec import Attention, EncoderSpec, LayerSpec, Mlp, ModelSpec, Norm, RelativeBias

MAX_POSITION = 1 << 15  # whatever is far has the same bias: no position is the last one

_PARTS = {
    "attention": "layer.0.SelfAttention",
    "mixer_norm": "layer.0.layer_norm",
    "cross": "layer.1.EncDecAttention",
    "cross_norm": "layer.1.layer_norm",
    "feedforward": "layer.LAST.DenseReluDense",
    "feedforward_norm": "layer.LAST.layer_norm",
}
_WHOLE = {"embedding.weight": "shared.weight", "head.weight": "lm_head.weight"}
_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# The embedding once more, and a table of the first files that nothing reads.
_IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


def read(reader: Reader) -> ModelSpec:
    """Only where the head is the embedding are its logits scaled. Transformers 5 writes that every head is, and the
    truth beside it."""
    reader.spelt(hidden_size="d_model", num_hidden_layers="num_layers", num_attention_heads="num_heads")
    reader.only("is_encoder_decoder", True)
    reader.ignore((*classic.TRAINING, *classic.SUMMARY, "dropout_rate", "initializer_factor", "n_positions"))
    hidden, norm = reader.size("hidden_size"), Norm(reader.number("layer_norm_epsilon", 1e-6))
    heads, size = reader.size("num_attention_heads"), reader.size("d_kv", 64, MAX_HEAD_DIM)
    cross, mlp = Attention(heads, heads, size, 1.0), _read_mlp(reader)
    mixer = Attention(heads, heads, size, 1.0, bias=_read_bias(reader))
    count = common.read_layers(reader)
    layers = reader.optional_size("num_decoder_layers", count, MAX_LAYERS) or count
    tied = reader.flag("scale_decoder_outputs", reader.flag("tie_word_embeddings", True))
    return ModelSpec(
        (LayerSpec(mixer, mlp, norm, norm, cross=cross, cross_norm=norm),) * layers,
        reader.size("vocab_size"), hidden, norm, MAX_POSITION, tied,
        logit_scale=hidden**-0.5 if tied else 1.0,
        encoder=EncoderSpec((LayerSpec(mixer, mlp, norm, norm),) * count, norm),
    )  # fmt: skip


def _read_mlp(reader: Reader) -> Mlp:
    """`feed_forward_proj` is an activation, "gated-" before it where there is a gate; "gated-gelu" is the tanh one."""
    stated = reader.get("feed_forward_proj", "relu")
    gated, name = str(stated).startswith("gated-"), str(stated).removeprefix("gated-")
    if name not in classic.ACTIVATIONS:
        raise reader.refused("feed_forward_proj", stated, f"{', '.join(classic.ACTIVATIONS)}, gated- or not")
    name = "gelu_new" if stated == "gated-gelu" else name
    reader.only("dense_act_fn", name)
    reader.only("is_gated_act", gated)
    return Mlp(reader.size("d_ff"), classic.ACTIVATIONS[name], gated=gated)


def _read_bias(reader: Reader) -> RelativeBias:
    buckets = reader.size("relative_attention_num_buckets", 32)
    if buckets % 4:
        raise reader.refused("relative_attention_num_buckets", buckets, "a multiple of 4")
    most = reader.size("relative_attention_max_distance", 128, MAX_POSITION)
    if most <= buckets // 2:
        raise reader.refused("relative_attention_max_distance", most, f"more than half of the {buckets} buckets")
    return RelativeBias(buckets, most)


def source(wanted: Wanted) -> str:
    if wanted.name in _WHOLE:
        return _WHOLE[wanted.name]
    stack, (part, _, name) = "encoder" if wanted.of_encoder else "decoder", wanted.part.partition(".")
    if wanted.layer < 0:
        return f"{stack}.{_TABLE if part == 'relative_bias' else 'final_layer_norm.weight'}"
    at = _PARTS[part].replace("LAST", "1" if wanted.of_encoder else "2")
    if part == "feedforward":
        mlp = wanted.spec.layers[0].feedforward
        up = "wi_1" if isinstance(mlp, Mlp) and mlp.gated else "wi"
        name = {"gate.weight": "wi_0.weight", "up.weight": f"{up}.weight", "down.weight": "wo.weight"}[name]
    return f"{stack}.block.{wanted.layer}.{at}.{name}"


FAMILY = Family("t5", ("T5ForConditionalGeneration", "T5WithLMHeadModel"), read, source, _IGNORED)
