"""The config.json of a converted checkpoint: NVIDIA's fields, and the original config under a key of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import UnsupportedError
from penstock.formats import FLOATS
from penstock.models.registry import family_of
from penstock.models.trtllm.ranks import Ranks
from penstock.spec import Attention, Mlp, ModelSpec

KEPT = "penstock"  # NVIDIA's reader keeps keys that it does not know, and acts on none
NAMES = {f.name: f.torch_dtype for f in FLOATS}  # format -> their word: f16 -> float16
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ACTS = {"silu": "silu", "gelu_tanh": "gelu"}  # NVIDIA's `gelu` is the tanh form
WRITTEN = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def write_config(spec: ModelSpec, config: Mapping[str, Any], ranks: Ranks, dtype: str) -> dict[str, Any]:
    """What NVIDIA's converter would write for this Hugging Face config, and the config itself.

    Raises UnsupportedError for a model that their layout has no words for.
    """
    family = family_of(config)
    mixer, mlp = spec.layers[0].mixer, spec.layers[0].feedforward
    if (
        family.name not in WRITTEN
        or not isinstance(mlp, Mlp)
        or not isinstance(mixer, Attention)
        or mlp.act not in _ACTS
    ):
        raise UnsupportedError(
            f"a {family.name} model with a feed-forward {mlp} cannot be written as a TensorRT-LLM checkpoint; known "
            f"are {', '.join(WRITTEN)} with {', '.join(_ACTS)}; build from its own directory instead"
        )
    assert mixer.rope and spec.final_norm, "these families rotate and normalise"
    return {
        "architecture": family.architectures[0],
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": mlp.size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_size": mixer.head_dim,
        "hidden_act": _ACTS[mlp.act],
        "norm_epsilon": spec.final_norm.eps,
        "max_position_embeddings": config.get("max_position_embeddings", spec.max_position),
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": mixer.rope.theta,
        "rotary_scaling": _scaling(config),
        "rotary_embedding_dim": mixer.rope.dim,
        "qk_layernorm": False,
        "attn_bias": mixer.qkv_bias,
        "mlp_bias": mlp.bias,
        "tie_word_embeddings": spec.tied_head,
        "use_parallel_embedding": ranks.split_table,
        "embedding_sharding_dim": ranks.table_dim,
        "mapping": _mapping(ranks),
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        **({"qwen_type": family.name} if family.name.startswith("qwen") else {}),
        **({"share_embedding_table": True} if family.name == "gemma" else {}),
        **{key: config[key] for key in _TOKENS if config.get(key) is not None},
        KEPT: {"config": dict(config)},
    }


def _mapping(ranks: Ranks) -> dict[str, Any]:
    return {"world_size": ranks.count, "tp_size": ranks.tp, "pp_size": ranks.pp, "cp_size": 1, "gpus_per_node": 8}


def _scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling as the config spells it, less the base that newer files keep beside it."""
    stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = {key: value for key, value in stated.items() if key != "rope_theta"}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return None if kind == "default" else scaling
