"""NVIDIA's config to the Hugging Face one that it was made from, which the families read. Closed world, as there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import ConfigError, ModelError, UnsupportedArchitectureError, UnsupportedError
from penstock.models.config import Reader, stored_format
from penstock.models.registry import read_spec
from penstock.models.trtllm.fields import KEPT, write_config
from penstock.models.trtllm.ranks import Ranks

FAMILIES = {
    "LlamaForCausalLM": "llama", "LLaMAForCausalLM": "llama", "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "GemmaForCausalLM": "gemma",
}  # fmt: skip
QWEN = ("QWenForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # whose qwen_type says which
ARCHITECTURES = {family: name for name, family in FAMILIES.items() if name != "LLaMAForCausalLM"}

# Keys that say nothing about the mathematics, by the reason why. Every attribute of NVIDIA's object is dumped.
IGNORED: Mapping[str, tuple[str, ...]] = {
    "how NVIDIA's runtime or its plugins run things": (
        "runtime_defaults", "disable_weight_only_quant_plugin", "has_partial_lora_mask", "kv_dtype", "max_lora_rank",
        "use_prompt_tuning", "use_fused_mlp", "force_num_profiles",
    ),
    "logits are float32 here": ("logits_dtype",),
    "who wrote the file": ("producer", "rank", "decoder"),
    "whether lm_head is in the files shows it": ("share_embedding_table",),
    "read from qwen_type: it is false for Qwen3 although the norms are there": ("qk_layernorm",),
    "special tokens, read with the tokenizer and generation settings": (
        "bos_token_id", "eos_token_id", "pad_token_id", "seq_length",
    ),
    "of mixtures of experts, where there is none": (
        "moe_num_experts", "moe_top_k", "moe_tp_mode", "moe_normalization_mode", "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "of classifiers": ("num_labels",),
    "restated by rotary_base and head_size": ("rotary_emb_base",),
}  # fmt: skip

# Keys with which the model would be another one; only these values can be read.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope_gpt_neox",),
    "residual_mlp": (False,),
    "remove_duplicated_kv_heads": (False,),
    "fc_after_embed": (False,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "layer_idx_offset": (0,),
    "embedding_multiplier": (1.0, 1),
    "attention_multiplier": (1.0, 1),
    "residual_multiplier": (1.0, 1),
    "output_multiplier_scale": (1.0, 1),
    "use_logn_attn": (False,),
    "inter_layernorms": (False,),
    "query_pre_attn_scalar": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "rotary_pct": (1.0, 1),
    "bias": (False,),
    "lm_head_bias": (False,),
    "rmsnorm": (True,),
}
_QUANTIZATION = (
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "use_meta_recipe",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
    "mamba_ssm_cache_dtype",
    "use_weight_only",
    "weight_only_precision",
    "activated_quant_algo",
)  # fmt: skip  (they qualify a scheme, and there is none)
_MAPPING = (
    "gpus_per_node",
    "moe_tp_size",
    "moe_cluster_size",
    "moe_ep_size",
    "attn_tp_size",
    "attn_cp_size",
    "rank",
    "auto_parallel",
    "enable_attention_dp",
)  # fmt: skip  (where a rank runs; experts there are none)
_ONCE_OUTSIDE = ("world_size", "tp_size", "pp_size", "cp_size", "gpus_per_node")  # beside `mapping` in old files


MAX_RANKS = 1024  # of each kind: a file each, and a node in the graph of each weight


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself: the Hugging Face config of its model, and how its tensors are dealt."""

    config: Mapping[str, Any]
    ranks: Ranks


def is_trtllm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is TensorRT-LLM's: it has one architecture, where Hugging Face's has a list."""
    return "architecture" in config and "architectures" not in config


def describe(config: Mapping[str, Any], head_of: Callable[[Ranks], bool]) -> Description:
    """Read a config. `head_of` tells whether the files have an lm_head; without one the embedding is the head.

    A config that `penstock convert` wrote holds the original and must agree with it. Raises ConfigError for any key or
    value that is not fully understood, UnsupportedError for a quantised checkpoint.
    """
    reader = Reader(config)
    _unquantised(reader)
    ranks = _ranks(reader)
    if KEPT in config:
        return Description(_kept(config, ranks), ranks)
    result = _translate(reader, _family(reader))
    if not head_of(ranks):
        result["tie_word_embeddings"] = True
    _close(reader)
    stored_format(result)
    return Description(result, ranks)


def _kept(config: Mapping[str, Any], ranks: Ranks) -> Mapping[str, Any]:
    """The config that was converted, in the dtype converted to, proved to say what the rest of the file says."""
    kept = config[KEPT]
    if not isinstance(kept, dict) or kept.keys() != {"config"} or not isinstance(kept["config"], dict):
        raise ConfigError(f"config.json: {KEPT!r} is not what `penstock convert` writes; convert the model again")
    original = {k: v for k, v in kept["config"].items() if k != "torch_dtype"} | {"dtype": config.get("dtype")}
    stored_format(original)
    expected = write_config(read_spec(original), original, ranks, original["dtype"])
    for key in dict.fromkeys((*expected, *config)):
        if key != KEPT and (key not in config or key not in expected or config[key] != expected[key]):
            raise ConfigError(
                f"config.json: {key} = {config.get(key)!r}, but the model that was converted has "
                f"{expected.get(key)!r}; convert it again instead of changing the file"
            )
    return original


def _family(reader: Reader) -> str:
    architecture, kind = reader.get("architecture"), reader.get("qwen_type", None)
    family = kind if architecture in QWEN and kind else FAMILIES.get(architecture)
    if family not in ARCHITECTURES:
        which = f"{architecture!r} of qwen_type {kind!r}" if kind else repr(architecture)
        raise UnsupportedArchitectureError(
            f"config.json: architecture {which} cannot be read from a TensorRT-LLM checkpoint; known are "
            f"{', '.join(FAMILIES)}"
        )
    return str(family)


def _unquantised(reader: Reader) -> None:
    nested = reader.nested("quantization")
    if nested is None:
        return
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if (value := nested.get(key, None)) is not None:
            raise UnsupportedError(
                f"config.json: quantization {key} = {value!r}: quantised TensorRT-LLM checkpoints cannot be read yet; "
                f"convert the model without quantisation, or build from its Hugging Face directory"
            )
    nested.only("use_weight_only", False)
    nested.ignore(_QUANTIZATION)
    nested.close()


def _ranks(reader: Reader) -> Ranks:
    nested = reader.nested("mapping") or Reader({})
    sizes = {key: nested.size(key, reader.get(key, 1), MAX_RANKS) for key in ("tp_size", "pp_size")}
    world = nested.size("world_size", reader.get("world_size", sizes["tp_size"] * sizes["pp_size"]))
    nested.only("cp_size", 1)
    reader.ignore(_ONCE_OUTSIDE)
    if world != sizes["tp_size"] * sizes["pp_size"]:
        raise nested.refused("world_size", world, f"tp_size {sizes['tp_size']} times pp_size {sizes['pp_size']}")
    nested.ignore(_MAPPING)
    nested.close()
    reader.only("embedding_sharding_dim", 0, 1)
    dim = 1 if reader.get("embedding_sharding_dim", 0) == 1 else 0
    return Ranks(sizes["tp_size"], sizes["pp_size"], reader.flag("use_parallel_embedding", False), dim)


def _translate(reader: Reader, family: str) -> dict[str, Any]:
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    if hidden % heads:
        reader.size("head_size")  # without it the division would have to come out
    size = reader.optional_size("head_size") or hidden // heads
    reader.only("rotary_embedding_dim", size, None)
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "dtype": reader.get("dtype"),
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": reader.optional_size("intermediate_size") or 4 * hidden,
        "num_hidden_layers": reader.size("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.optional_size("num_key_value_heads") or heads,
        "head_dim": size,
        "hidden_act": reader.get("hidden_act"),
        "rms_norm_eps": reader.number("norm_epsilon", 1e-5),
        "max_position_embeddings": reader.size("max_position_embeddings"),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
        "rope_theta": reader.number("rotary_base", 10000.0),
        "rope_scaling": reader.get("rotary_scaling", None),
        **_OWN[family](reader),
    }


def _llama(reader: Reader) -> dict[str, Any]:
    return {"attention_bias": reader.flag("attn_bias", False), "mlp_bias": reader.flag("mlp_bias", False)}


def _mistral(reader: Reader) -> dict[str, Any]:
    """The window is not in the file: what is stated is attention to everything."""
    reader.only("attn_bias", False)
    reader.only("mlp_bias", False)
    return {"sliding_window": None}


def _qwen2(reader: Reader) -> dict[str, Any]:
    reader.only("attn_bias", True)
    reader.only("mlp_bias", False)
    return {"use_sliding_window": False}


def _qwen3(reader: Reader) -> dict[str, Any]:
    reader.only("mlp_bias", False)
    return {"attention_bias": reader.flag("attn_bias", False), "use_sliding_window": False}


def _gemma(reader: Reader) -> dict[str, Any]:
    """The head is always the embedding, whether or not it was written out."""
    reader.only("mlp_bias", False)
    return {"attention_bias": reader.flag("attn_bias", False), "tie_word_embeddings": True}


_OWN: Mapping[str, Callable[[Reader], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
}


def _close(reader: Reader) -> None:
    moe = reader.nested("moe")
    if moe is not None and moe.get("num_experts", 0) != 0:
        raise moe.refused("num_experts", moe.get("num_experts"), "0: a dense model")
    reader.only("moe_num_experts", 0)
    for key, values in NEUTRAL.items():
        reader.only(key, *values)
    for keys in IGNORED.values():
        reader.ignore(keys)
    try:
        reader.close()
    except ModelError as error:
        raise ConfigError(f"TensorRT-LLM {error}") from None
