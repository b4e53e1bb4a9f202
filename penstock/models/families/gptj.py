"""GPT-J: attention and feed-forward both read one norm; neighbours are turned together. (Wang and Komatsuzaki 2021.)"""

from __future__ import annotations

from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.spec import LayerSpec, ModelSpec, Rope

_PARTS = {
    "attention.q": "attn.q_proj",
    "attention.k": "attn.k_proj",
    "attention.v": "attn.v_proj",
    "attention.o": "attn.out_proj",
    "mixer_norm": "ln_1",
    "feedforward.up": "mlp.fc_in",
    "feedforward.down": "mlp.fc_out",
}
_WHOLE = {"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}


def read(reader: Reader) -> ModelSpec:
    reader.spelt(**classic.GPT_WORDS)
    reader.ignore(classic.SUMMARY)
    for key in ("rotary", "scale_attn_weights"):  # Transformers reads neither: it always does both
        reader.only(key, True)
    limit, norm, heads = (
        reader.size("max_position_embeddings", 2048),
        classic.read_norm(reader),
        classic.read_heads(reader),
    )
    reader.only("n_ctx", limit)
    dim = reader.size("rotary_dim", 64)
    if dim % 2 or dim > heads.head_dim:
        raise reader.refused("rotary_dim", dim, f"an even number, at most the head's {heads.head_dim}")
    mixer = classic.attention(heads, Rope(10000.0, dim, interleaved=True), bias=False)
    mlp = classic.read_mlp(reader, "activation_function", "gelu_new")
    layer = LayerSpec(mixer, mlp, norm, None, residual="parallel")
    return assemble(reader, [layer] * common.read_layers(reader), norm, limit, head_bias=True)


def source(wanted: Wanted) -> str:
    return common.named(wanted, "transformer.h.{}", _PARTS, _WHOLE)


FAMILY = Family("gptj", ("GPTJForCausalLM",), read, source, (rf"transformer\.h\.\d+\.{classic.MASKS}",))
