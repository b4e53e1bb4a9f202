"""Phi-1, 1.5 and 2: attention and feed-forward both read one norm, biases everywhere. (Gunasekar et al. 2023.)"""

from __future__ import annotations

from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import ROTARY_BUFFERS, assemble
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.spec import LayerSpec, ModelSpec

_PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.dense",
    "mixer_norm": "input_layernorm",
    "feedforward.up": "mlp.fc1",
    "feedforward.down": "mlp.fc2",
}
_WHOLE = {"embedding": "model.embed_tokens", "final_norm": "model.final_layernorm", "head": "lm_head"}


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 2048), classic.read_norm(reader, "layer_norm_eps")
    reader.only("qk_layernorm", False)  # no published model has them
    heads = classic.read_heads(reader, reader.optional_size("num_key_value_heads"))
    mixer = classic.attention(heads, read_rope(reader, heads.head_dim, limit, partial=0.5))
    layer = LayerSpec(mixer, classic.read_mlp(reader, "hidden_act", "gelu_new"), norm, None, residual="parallel")
    return assemble(reader, [layer] * common.read_layers(reader), norm, limit, head_bias=True)


def source(wanted: Wanted) -> str:
    return common.named(wanted, "model.layers.{}", _PARTS, _WHOLE)


FAMILY = Family("phi", ("PhiForCausalLM",), read, source, (ROTARY_BUFFERS,))
