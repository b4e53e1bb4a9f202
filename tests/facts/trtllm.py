"""Writes TensorRT-LLM checkpoints (`config.json`, `rankN.safetensors`) from Hugging Face tensors, without Penstock.

Every rule is a fact read in NVIDIA/TensorRT-LLM, cited where it is applied; SOURCES.md lists the files and commits:
[doc]     docs/source/architecture/checkpoint.md: the directory, the config fields, linear weights are [out, in]
[utils]   tensorrt_llm/models/modeling_utils.py: PretrainedConfig.to_dict, the fields and defaults of config.json
[mapping] tensorrt_llm/mapping.py: rank = pp_rank * tp_size + tp_rank; torch.tensor_split deals layers to stages
[llama]   tensorrt_llm/models/llama/{config,convert}.py: Llama and Mistral
[qwen]    tensorrt_llm/models/qwen/{config,convert,model}.py: Qwen2 and Qwen3
[gemma]   tensorrt_llm/models/gemma/{config,convert,model}.py
[loader]  tensorrt_llm/models/model_weights_loader.py: the table of names, "fc" = gate_proj and "gate" = up_proj
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

# [loader] tllm_to_externel_key_dict; the dimension is the one that tensor parallelism splits ([out, in] storage).
# `fc` carries the activated half (HF's gate_proj) and `gate` the linear half (HF's up_proj): the names are crossed.
_SPLIT_LINEARS = (
    ("attention.dense", "self_attn.o_proj", 1),
    ("mlp.fc", "mlp.gate_proj", 0),
    ("mlp.gate", "mlp.up_proj", 0),
    ("mlp.proj", "mlp.down_proj", 1),
)
# [llama] "Layer norms do not use tensor parallelism"; [qwen] q_norm and k_norm likewise.
_WHOLE_NORMS = (
    ("input_layernorm", "input_layernorm"),
    ("post_layernorm", "post_attention_layernorm"),
    ("attention.q_layernorm", "self_attn.q_norm"),
    ("attention.k_layernorm", "self_attn.k_norm"),
)
# [llama] [qwen] [gemma] each family's defaults when the key is absent from config.json
_TIED_BY_DEFAULT = {"llama": False, "mistral": False, "qwen2": False, "qwen3": False, "gemma": True}


@dataclass(frozen=True)
class _Job:
    """What every rank shares."""

    config: Config
    source: Tensors
    tp: int
    pp: int
    dtype: torch.dtype
    parallel_embedding: bool
    lm_head: bool

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", _TIED_BY_DEFAULT[self.family]))

    @property
    def heads(self) -> int:
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_size(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)


def write_trtllm(
    config: Config,
    hf_tensors: Tensors,
    out: Path,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "float16",
    *,
    use_parallel_embedding: bool = False,
    lm_head: bool = True,
) -> None:
    """Write the checkpoint of `hf_tensors` ([out, in] weights under HF names) for `tp * pp` ranks into directory `out`.

    `use_parallel_embedding` splits the embedding by rows over tp ranks (Gemma always does when tp > 1).
    `lm_head=False` leaves out a tied `lm_head.weight`, as converters with a shared embedding table do.
    Raises ValueError where NVIDIA's converter cannot write such a checkpoint.
    """
    parallel = use_parallel_embedding or (config["model_type"] == "gemma" and tp > 1)
    job = _Job(config, hf_tensors, tp, pp, getattr(torch, dtype), parallel, lm_head)
    _check(job)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(_config(job, dtype), indent=4))
    for rank in range(tp * pp):
        save_file(_rank(job, rank % tp, rank // tp), out / f"rank{rank}.safetensors")


def _check(job: _Job) -> None:
    if job.family not in _TIED_BY_DEFAULT:
        raise ValueError(f"model_type {job.family!r} is not one of {sorted(_TIED_BY_DEFAULT)}")
    if job.heads % job.tp or (job.kv_heads % job.tp and job.tp % job.kv_heads):
        raise ValueError(f"{job.heads} heads, {job.kv_heads} KV heads do not divide over tp {job.tp}")
    if job.family == "gemma":
        _check_gemma(job)
    if not job.lm_head and not job.tied:
        raise ValueError("lm_head=False needs tied embeddings")


def _check_gemma(job: _Job) -> None:
    # [gemma] convert.py knows no stages, splits KV heads unless there is one, and asserts vocab_size % tp_size == 0
    if job.pp > 1 or (job.kv_heads > 1 and job.kv_heads % job.tp) or job.config["vocab_size"] % job.tp:
        raise ValueError(f"Gemma is not converted for tp {job.tp}, pp {job.pp}")


def _rank(job: _Job, tp_rank: int, stage: int) -> Tensors:
    layers = torch.tensor_split(torch.arange(int(job.config["num_hidden_layers"])), job.pp)[stage].tolist()
    result: Tensors = {}
    if stage == 0:
        result["transformer.vocab_embedding.weight"] = _embedding(job, tp_rank)
    # [llama] layers are numbered from 0 on every stage: transformer.layers.{layer - layers_range[0]}
    for local, layer in enumerate(layers):
        for name, tensor in _layer(job, layer, tp_rank).items():
            result[f"transformer.layers.{local}.{name}"] = tensor
    if stage == job.pp - 1:
        result["transformer.ln_f.weight"] = _norm(job, job.source["model.norm.weight"])
        if job.lm_head:
            result["lm_head.weight"] = _piece(_pad_rows(_head(job), job.tp), job.tp, tp_rank, 0)
    # safetensors refuses tensors that share memory, and the published files hold contiguous ones
    return {name: tensor.to(job.dtype).contiguous().clone() for name, tensor in result.items()}


def _layer(job: _Job, layer: int, tp_rank: int) -> Tensors:
    prefix = f"model.layers.{layer}."
    result = _qkv(job, prefix, tp_rank)
    for target, name, dim in _SPLIT_LINEARS:
        result[f"{target}.weight"] = _piece(job.source[f"{prefix}{name}.weight"], job.tp, tp_rank, dim)
        bias = job.source.get(f"{prefix}{name}.bias")
        if bias is not None:
            # a row-parallel linear keeps its whole bias on every rank: it is added once, after the all-reduce
            result[f"{target}.bias"] = bias if dim == 1 else _piece(bias, job.tp, tp_rank, 0)
    for target, name in _WHOLE_NORMS:
        if f"{prefix}{name}.weight" in job.source:
            result[f"{target}.weight"] = _norm(job, job.source[f"{prefix}{name}.weight"])
    return result


def _qkv(job: _Job, prefix: str, tp_rank: int) -> Tensors:
    """[llama] QkvWeightHelper.split_qkv_weights: per rank, the rank's q rows, then its k rows, then its v rows."""
    result: Tensors = {}
    for kind in ("weight", "bias"):
        q, k, v = (job.source.get(f"{prefix}self_attn.{n}_proj.{kind}") for n in "qkv")
        if q is not None and k is not None and v is not None:
            parts = (_piece(q, job.tp, tp_rank, 0), _kv_piece(job, k, tp_rank), _kv_piece(job, v, tp_rank))
            result[f"attention.qkv.{kind}"] = torch.cat(parts)
    return result


def _kv_piece(job: _Job, tensor: torch.Tensor, tp_rank: int) -> torch.Tensor:
    """[llama] convert_utils.dup_kv_weight: with more ranks than KV heads, neighbouring ranks hold the same head."""
    if job.kv_heads >= job.tp:
        return _piece(tensor, job.tp, tp_rank, 0)
    head = tp_rank * job.kv_heads // job.tp
    return tensor[head * job.head_size : (head + 1) * job.head_size]


def _embedding(job: _Job, tp_rank: int) -> torch.Tensor:
    table = job.source["model.embed_tokens.weight"]
    if job.parallel_embedding:
        return _piece(_pad_rows(table, job.tp), job.tp, tp_rank, 0)
    # [llama] with a tied head the padded table replaces the plain one, so a whole embedding may have padded rows too;
    # [qwen] pads a copy.
    return _pad_rows(table, job.tp) if job.tied and job.family in ("llama", "mistral") else table


def _head(job: _Job) -> torch.Tensor:
    return job.source["model.embed_tokens.weight" if job.tied else "lm_head.weight"]


def _norm(job: _Job, weight: torch.Tensor) -> torch.Tensor:
    """[gemma] convert.py stores `param + 1.0`, added in float32; the embedding is stored unscaled (model.py scales)."""
    return weight.float() + 1.0 if job.family == "gemma" else weight


def _piece(tensor: torch.Tensor, tp: int, tp_rank: int, dim: int) -> torch.Tensor:
    if tensor.shape[dim] % tp:
        raise ValueError(f"dimension {dim} of {tuple(tensor.shape)} does not divide over tp {tp}")
    return tensor.chunk(tp, dim)[tp_rank]


def _pad_rows(tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """[llama] pad_vocab_size: zero rows up to a multiple of tp_size."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % tp))


def _config(job: _Job, dtype: str) -> Config:
    config = job.config
    return {
        "architecture": config["architectures"][0],
        "dtype": dtype,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": job.heads,
        "hidden_act": config.get("hidden_act", "silu"),
        "logits_dtype": "float32",
        "norm_epsilon": config["rms_norm_eps"],
        "runtime_defaults": None,
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": job.kv_heads,
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "mapping": _mapping(job),
        "quantization": dict(_NO_QUANTIZATION),
        "use_parallel_embedding": job.parallel_embedding,
        "embedding_sharding_dim": 0,
        "head_size": job.head_size,
        # [qwen] qk_layernorm is derived from qwen_type, so it stays False here even for Qwen3
        "qk_layernorm": False,
        "rotary_embedding_dim": job.head_size,
        **_family_fields(job),
    }


# [utils] QuantConfig, all fields
_NO_QUANTIZATION: Config = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
}


def _mapping(job: _Job) -> Config:
    """[mapping] Mapping.to_dict, less `rank`, which [utils] drops."""
    return {
        "world_size": job.tp * job.pp,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": job.tp,
        "pp_size": job.pp,
        "moe_tp_size": job.tp,
        "moe_cluster_size": 1,
        "moe_ep_size": 1,
        "attn_tp_size": job.tp,
        "attn_cp_size": 1,
        "auto_parallel": False,
    }


def _family_fields(job: _Job) -> Config:
    if job.family == "gemma":
        return _gemma_fields()
    theta, scaling = _rope(job.config)
    fields: Config = {
        "mlp_bias": False,
        "rotary_base": theta,
        "rotary_scaling": scaling,
        "disable_weight_only_quant_plugin": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
        "tie_word_embeddings": job.tied,
    }
    return fields | (_llama_fields(job) if job.family in ("llama", "mistral") else _qwen_fields(job))


def _rope(config: Config) -> tuple[float, Config | None]:
    """(base, scaling) of either spelling; scaling is passed on as HF wrote it, `type` or `rope_type`."""
    new = config.get("rope_parameters")
    if new is None:
        return config.get("rope_theta", 10000.0), config.get("rope_scaling")
    scaling = {key: value for key, value in new.items() if key != "rope_theta"}
    return new["rope_theta"], None if scaling.get("rope_type", "default") == "default" else scaling


def _llama_fields(job: _Job) -> Config:
    """[llama] LLaMAConfig. It has no field for a sliding window: Mistral's is lost in conversion."""
    return {
        "attn_bias": bool(job.config.get("attention_bias", False)),
        "residual_mlp": False,
        "remove_duplicated_kv_heads": False,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "output_multiplier_scale": 1.0,
    }


def _qwen_fields(job: _Job) -> Config:
    """[qwen] QWenConfig: Qwen2 has biases on q, k and v, Qwen3 on nothing."""
    return {
        "attn_bias": job.family == "qwen2",
        "qwen_type": job.family,
        "seq_length": 8192,
        "use_logn_attn": False,
        "num_labels": 1,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
    }


def _gemma_fields() -> Config:
    """[gemma] GemmaConfig: rope_theta is never read, the base is always the default; the table is always shared."""
    return {
        "share_embedding_table": True,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
        "inter_layernorms": False,
    }
