"""GPT-2: learned positions, LayerNorm, matrices that multiply from the right. (Radford et al. 2019.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.storage import fused_qkv, transposed
from penstock.spec import LayerSpec, ModelSpec

PARTS = {
    **classic.qkv("attn.c_attn"),
    "attention.o": "attn.c_proj",
    "mixer_norm": "ln_1",
    "feedforward_norm": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}
WHOLE = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
# Files saved from the model without its head, as the first ones were, leave the prefix out.
RENAMED = ((r"^(?=(h|wte|wpe|ln_f)\.)", "transformer."),)
IGNORED = (rf"transformer\.h\.\d+\.{classic.MASKS}",)


def read(reader: Reader) -> ModelSpec:
    reader.spelt(**classic.GPT_WORDS)
    reader.ignore(classic.SUMMARY + classic.PRECISION)
    limit, norm = reader.size("max_position_embeddings", 1024), classic.read_norm(reader)
    reader.only("n_ctx", limit)
    mixer, mlp = (
        classic.attention(classic.read_heads(reader)),
        classic.read_mlp(reader, "activation_function", "gelu_new"),
    )
    scale = mixer.scale if reader.flag("scale_attn_weights", True) else 1.0
    by_layer = reader.flag("scale_attn_by_inverse_layer_idx", False)
    scales = [scale / (i + 1) if by_layer else scale for i in range(common.read_layers(reader))]
    layers = [LayerSpec(replace(mixer, scale=s), mlp, norm, norm) for s in scales]
    return assemble(reader, layers, norm, limit, tied=True, learned_positions=limit)


def source(wanted: Wanted) -> Value | str:
    name = common.named(wanted, "transformer.h.{}", PARTS, WHOLE)
    if classic.is_qkv(wanted):
        return fused_qkv(wanted, name, flipped=True)
    if wanted.layer >= 0 and len(wanted.shape) == 2:
        return transposed(wanted.tensor(name, *wanted.shape[::-1]))
    return name


FAMILY = Family("gpt2", ("GPT2LMHeadModel",), read, source, IGNORED, RENAMED)
