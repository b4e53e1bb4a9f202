"""StarCoder2: LayerNorm, biases and grouped heads behind a window. (Lozhkov et al. 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble, renaming
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.spec import LayerSpec, ModelSpec

_SOURCE = renaming({"feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj"})


def read(reader: Reader) -> ModelSpec:
    """Published files still have the words of StarCoder beside their own, and values that hold no longer."""
    reader.ignore((*classic.TRAINING, *classic.PRECISION, "activation_function", "layer_norm_epsilon"))
    reader.only("norm_type", "layer_norm")
    reader.only("mlp_type", "default")
    reader.only("scale_attn_weights", True)
    limit, norm = reader.size("max_position_embeddings", 4096), classic.read_norm(reader, "norm_epsilon")
    heads = classic.read_heads(reader, reader.optional_size("num_key_value_heads", 2))
    bias, window = reader.flag("use_bias", True), reader.optional_size("sliding_window")
    mixer = replace(classic.attention(heads, read_rope(reader, heads.head_dim, limit), bias), window=window or 0)
    mlp = classic.read_mlp(reader, "hidden_act", "gelu_pytorch_tanh", bias)
    layers = [LayerSpec(mixer, mlp, norm, norm)] * common.read_layers(reader)
    return assemble(reader, layers, norm, limit, tied=True)


FAMILY = Family("starcoder2", ("Starcoder2ForCausalLM",), read, _SOURCE)
