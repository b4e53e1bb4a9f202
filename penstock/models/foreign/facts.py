"""What the settings of Megatron-LM and NeMo say about the model, and the Hugging Face config that says the same.

Both write hundreds of settings of a training run into one namespace. Those that change what the model computes are
read or must have their neutral value; others are not looked at. That nothing is missed in the weights is proved apart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import ConfigError, UnsupportedError
from penstock.models.foreign.shards import Shards

_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# Settings that would make another model, and what they must be.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_experts": (None,), "num_moe_experts": (None,), "window_size": (None,), "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,), "squared_relu": (False,), "rotary_interleaved": (False,),
    "transformer_block_type": ("pre_ln",), "attention_type": ("multihead",), "head_scale": (False,),
    "normalize_attention_scores": (True,), "apply_embedding_scaling": (False,), "scale_positional_embedding": (False,),
    "num_layers_per_virtual_pipeline_stage": (None,), "virtual_pipeline_model_parallel_size": (None,),
    "mtp_num_layers": (None,), "final_logit_softcapping": (None,), "is_hybrid_model": (False,),
    "checkpoint_version": (3.0, 2.0), "softmax_scale": (None,), "softmax_type": ("vanilla",), "qk_l2_norm": (False,),
    "no_rope_freq": (None,), "quick_geglu": (False,), "glu_linear_offset": (0.0,),
    "activation_func_clamp_value": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """A decoder of Megatron's: sizes, norm, activation, positions and biases."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    positions: int
    vocab: int
    eps: float
    rms: bool
    one_added: bool  # to the stored weights of norms
    gated: bool
    act: str
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    rope: bool
    theta: float
    rotary_fraction: float
    scaling: Mapping[str, Any] | None


class _Settings:
    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def get(self, *names: str, default: Any = None) -> Any:
        """What any of the names says, null saying nothing. Raises ConfigError where two of them differ."""
        stated = {name: self._values[name] for name in names if self._values.get(name) is not None}
        first = next(iter(stated), "")
        for name, value in stated.items():
            if value != stated[first]:
                raise self.refused(name, value, f"the same as {first} = {stated[first]!r}")
        return stated.get(first, default)

    def one(self, *names: str, default: Any = None) -> Any:
        """The same, where names that are there agree."""
        value = self.get(*names, default=default)
        for name in names:
            if self._values.get(name, value) not in (value, None):
                raise self.refused(name, self._values[name], f"{value!r}, as {', '.join(names)} are one setting")
        return value

    def size(self, *names: str, default: int | None = None) -> int:
        value = self.one(*names, default=default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.refused(names[0], value, "a positive integer")
        return value

    def number(self, *names: str, default: float) -> float:
        value = self.one(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.refused(names[0], value, "a positive number")
        return float(value)

    def flag(self, *names: str, default: bool) -> bool:
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise self.refused(names[0], value, "true or false")
        return value

    def word(self, *names: str, default: str, among: tuple[str, ...]) -> str:
        value = self.get(*names, default=default)
        if not isinstance(value, str) or value.lower() not in among:
            raise self.refused(names[0], value, f"one of {', '.join(among)}")
        return value.lower()

    def refused(self, name: str, value: object, expected: str) -> ConfigError:
        return ConfigError(f"{self._where} settings: {name} = {value!r} is not implemented; expected {expected}")


def read_facts(values: Mapping[str, Any], model_format: str, shards: Shards) -> Facts:
    """Raises ConfigError for a value that is missing or not implemented, or contradicts the files."""
    settings = _Settings(values, model_format)
    for name, neutral in _NEUTRAL.items():
        if (value := settings.get(name, default=neutral[0])) not in neutral:
            raise settings.refused(name, value, " or ".join(map(repr, neutral)))
    _check_ranks(settings, shards)
    nemo = model_format == "nemo"
    layers, hidden, heads = (settings.size(n) for n in ("num_layers", "hidden_size", "num_attention_heads"))
    ffn = settings.size("ffn_hidden_size", default=4 * hidden)
    if nemo or settings.flag("group_query_attention", default=False):
        groups = settings.size("num_query_groups", default=heads)
    else:
        groups = heads
    gated, act = _nemo_activation(settings) if nemo else _megatron_activation(settings)
    norms = ("layernorm", "rmsnorm", *(("layernorm1p",) if nemo else ()))
    norm = settings.word("normalization", default="layernorm", among=norms)
    kinds = ("learned_absolute", "rope")
    stated = settings.word("position_embedding_type", default=kinds[0], among=kinds)
    rope = stated == "rope" or settings.flag("use_rotary_position_embeddings", default=False)
    bias = settings.flag("bias" if nemo else "add_bias_linear", default=True)
    if sum(shards.stages) != layers:
        raise settings.refused("num_layers", layers, f"{sum(shards.stages)}, as many as the files hold")
    _check_shares(settings, shards.tp, heads, groups, ffn)
    return Facts(
        layers, hidden, ffn, heads, groups,
        settings.size("kv_channels", default=hidden // heads), settings.size("max_position_embeddings"),
        _vocabulary(settings), settings.number("layernorm_epsilon", "norm_epsilon", default=1e-5),
        norm == "rmsnorm", norm == "layernorm1p" or settings.flag("apply_layernorm_1p", default=False), gated, act,
        bias, bias or settings.flag("add_qkv_bias", "qkv_bias", default=False),
        settings.flag("qk_layernorm", default=False), _tied(settings, nemo), rope,
        settings.number("rotary_base", default=10000.0),
        settings.number("rotary_percentage" if nemo else "rotary_percent", default=1.0), _scaling(settings),
    )  # fmt: skip


def _check_ranks(settings: _Settings, shards: Shards) -> None:
    for name, found in (("tensor_model_parallel_size", shards.tp), ("pipeline_model_parallel_size", shards.pp)):
        if settings.size(name, default=found) != found:
            raise settings.refused(name, settings.get(name), f"{found}, as many as the files are of; fetch them all")


def _check_shares(settings: _Settings, tp: int, heads: int, groups: int, ffn: int) -> None:
    if heads % groups or groups % tp:
        expected = f"a divisor of {heads} heads, and a multiple of the {tp} tensor ranks"
        raise settings.refused("num_query_groups", groups, expected)
    if ffn % tp:
        raise settings.refused("ffn_hidden_size", ffn, f"a multiple of the {tp} tensor ranks")


def _vocabulary(settings: _Settings) -> int:
    if settings.get("vocab_size", "true_vocab_size", "override_vocab_size") is None:
        raise settings.refused(
            "vocab_size",
            None,
            "the number of tokens without padding; write it into the settings, the files do not tell",
        )
    return settings.size("vocab_size", "true_vocab_size", "override_vocab_size")


def _nemo_activation(settings: _Settings) -> tuple[bool, str]:
    among = ("gelu", "swiglu", "fast-swiglu", "openai-gelu", "openai_gelu")
    word = settings.word("activation", default="gelu", among=among)
    fused = settings.flag("bias_activation_fusion", "bias_gelu_fusion", default=True)
    exact = word == "gelu" and not fused and not settings.flag("openai_gelu", default=False)
    return "swiglu" in word, "silu" if "swiglu" in word else "gelu" if exact else "gelu_new"


def _megatron_activation(settings: _Settings) -> tuple[bool, str]:
    """Its fused GELU, which it uses unless told not to, is the approximation by tanh."""
    if settings.flag("swiglu", default=False):
        return True, "silu"
    fused = settings.flag("bias_gelu_fusion", default=True) or settings.flag("openai_gelu", default=False)
    return False, "gelu_new" if fused else "gelu"


def _tied(settings: _Settings, nemo: bool) -> bool:
    if nemo:
        return settings.flag("share_embeddings_and_output_weights", default=True)
    return not settings.flag("untie_embeddings_and_output_weights", default=False)


def _scaling(settings: _Settings) -> Mapping[str, Any] | None:
    """Llama 3's stretching has fixed borders in Megatron; its other scaling divides positions."""
    linear = settings.number("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", default=1.0)
    if settings.flag("use_rope_scaling", default=False):
        factor = settings.number("rope_scaling_factor", default=8.0)
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}  # fmt: skip
    return None if linear == 1.0 else {"rope_type": "linear", "factor": linear}


def hf_config(facts: Facts, dtype: str) -> dict[str, Any]:
    """Raises UnsupportedError for a mixture of parts that no family has."""
    common = {"dtype": _TORCH[dtype], "vocab_size": facts.vocab, "tie_word_embeddings": facts.tied}
    if facts.rms and facts.gated and facts.rope and facts.rotary_fraction == 1.0 and not facts.one_added:
        return _llama(facts) | common
    plain = (
        facts.groups == facts.heads
        and facts.bias
        and not facts.qk_norm
        and facts.head_dim * facts.heads == facts.hidden
    )
    if not facts.rms and not facts.gated and plain and facts.scaling is None:
        return (_neox(facts) if facts.rope else _gpt2(facts)) | common
    norm, act = "RMSNorm" if facts.rms else "LayerNorm", f"gated {facts.act}" if facts.gated else facts.act
    raise UnsupportedError(
        f"a Megatron model with {norm}{' (1 added)' if facts.one_added else ''}, {act}, "
        f"{'rotary' if facts.rope else 'learned'} positions, {facts.groups} KV heads of {facts.heads}, "
        f"biases: {facts.bias} is not built yet; convert Llama-shaped ones (RMSNorm, SwiGLU, rotary) and GPT-shaped "
        "ones (LayerNorm, GELU, biases)"
    )


def _llama(facts: Facts) -> dict[str, Any]:
    kind = "qwen3" if facts.qk_norm else "qwen2" if facts.qkv_bias and not facts.bias else "llama"
    if facts.qkv_bias and kind == "qwen3":
        raise UnsupportedError("normalised queries and keys with biases are not built yet; convert a model without")
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
    biases = {"attention_bias": facts.bias, "mlp_bias": facts.bias} if kind == "llama" else {}
    own_size = kind == "qwen3" or facts.head_dim * facts.heads != facts.hidden
    return {
        "architectures": [name], "model_type": kind, "hidden_size": facts.hidden, "intermediate_size": facts.ffn,
        "num_hidden_layers": facts.layers, "num_attention_heads": facts.heads, "num_key_value_heads": facts.groups,
        "max_position_embeddings": facts.positions, "rms_norm_eps": facts.eps, "rope_theta": facts.theta,
        "hidden_act": facts.act, **biases, **({"head_dim": facts.head_dim} if own_size else {}),
        **({"rope_scaling": facts.scaling} if facts.scaling else {}),
    }  # fmt: skip


def _gpt2(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": facts.hidden, "n_inner": facts.ffn,
        "n_layer": facts.layers, "n_head": facts.heads, "n_positions": facts.positions,
        "layer_norm_epsilon": facts.eps, "activation_function": facts.act,
    }  # fmt: skip


def _neox(facts: Facts) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_size": facts.hidden,
        "intermediate_size": facts.ffn, "num_hidden_layers": facts.layers, "num_attention_heads": facts.heads,
        "max_position_embeddings": facts.positions, "layer_norm_eps": facts.eps, "rotary_pct": facts.rotary_fraction,
        "rotary_emb_base": facts.theta, "hidden_act": facts.act, "use_parallel_residual": False, "attention_bias": True,
    }  # fmt: skip
