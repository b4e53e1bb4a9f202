"""BART: encoder and decoder with learned positions from the third row on, normalised behind. (Lewis et al. 2020.)"""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import MAX_HEAD_DIM, MAX_LAYERS
from penstock.models.families.opt import OFFSET
from penstock.models.registry import Family
from penstock.models.storage import rows
from penstock.spec import Attention, EncoderSpec, LayerNorm, LayerSpec, Mlp, ModelSpec

_PARTS = {
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attention.o": "self_attn.out_proj",
    "mixer_norm": "self_attn_layer_norm",
    **{f"cross.{part}": f"encoder_attn.{part}_proj" for part in "qkv"},
    "cross.o": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
    "feedforward_norm": "final_layer_norm",
}
_WHOLE = {"positions": "embed_positions", "embedding_norm": "layernorm_embedding"}
_NEUTRAL = {  # keys of the first files
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "extra_pos_embeddings": OFFSET,
    "normalize_before": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
}
_UNREAD = ("classif_dropout", "decoder_layerdrop", "encoder_layerdrop", "force_bos_token_to_be_generated")
# The embedding once more, and a mark of the first converter.
_IGNORED = (r"model\.(encoder|decoder)\.(embed_tokens\.weight|version)",)
# The base files were saved from the model without its head.
_RENAMED = ((r"^(?=(shared|encoder|decoder)\.)", "model."),)


def read(reader: Reader) -> ModelSpec:
    """A file of the model without its head has no bias for it either."""
    reader.spelt(hidden_size="d_model")
    reader.only("is_encoder_decoder", True)
    reader.ignore((*classic.TRAINING, *classic.SUMMARY, *_UNREAD))
    for key, value in _NEUTRAL.items():
        reader.only(key, value)
    hidden, limit, norm = reader.size("hidden_size"), reader.size("max_position_embeddings", 1024), LayerNorm(1e-5)
    encoder, decoder = (_read_stack(reader, side, norm) for side in ("encoder", "decoder"))
    reader.only("num_hidden_layers", len(encoder))
    return ModelSpec(
        decoder, reader.size("vocab_size"), hidden, None, limit, reader.flag("tie_word_embeddings", True),
        embedding_scale=hidden**0.5 if reader.flag("scale_embedding", False) else 1.0,
        embedding_norm=norm,
        learned_positions=limit,
        head_bias=reader.get("architectures", None) != ["BartModel"],
        encoder=EncoderSpec(encoder, None, norm, limit),
    )  # fmt: skip


def _read_stack(reader: Reader, side: str, norm: LayerNorm) -> tuple[LayerSpec, ...]:
    hidden, heads = reader.size("hidden_size"), reader.size(f"{side}_attention_heads")
    if hidden % heads or hidden // heads > MAX_HEAD_DIM:
        raise reader.refused(f"{side}_attention_heads", heads, f"a divisor of d_model = {hidden}")
    size = hidden // heads
    mixer = Attention(heads, heads, size, size**-0.5, qkv_bias=True, out_bias=True)
    act = reader.choice("activation_function", classic.ACTIVATIONS, "gelu")
    mlp = Mlp(reader.size(f"{side}_ffn_dim"), act, bias=True, gated=False)
    cross = {"cross": mixer, "cross_norm": norm} if side == "decoder" else {}
    layer = LayerSpec(mixer, mlp, norm, norm, residual="post", **cross)  # type: ignore[arg-type]
    return (layer,) * reader.size(f"{side}_layers", most=MAX_LAYERS)


def source(wanted: Wanted) -> Value | str:
    match wanted.name:
        case "embedding.weight":
            return "model.shared.weight"
        case "head.weight":
            return "lm_head.weight"
        case "head.bias":
            return emit("reshape", wanted.tensor("final_logits_bias", 1, *wanted.shape), shape=wanted.shape)[0]
    stack = "model.encoder" if wanted.of_encoder else "model.decoder"
    name = common.named(wanted, f"{stack}.layers.{{}}", _PARTS, {k: f"{stack}.{v}" for k, v in _WHOLE.items()})
    if wanted.part != "positions.weight":
        return name
    count, hidden = wanted.shape
    return rows(wanted.tensor(name, count + OFFSET, hidden), OFFSET, count + OFFSET)


FAMILY = Family("bart", ("BartForConditionalGeneration", "BartModel"), read, source, _IGNORED, _RENAMED)
