"""Hugging Face tensors written as Megatron's ranks hold them, by loops over heads: what the converter must undo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
# Each part of a layer, in the spellings of three writers.
CORE = {
    "norm1": "self_attention.linear_qkv.layer_norm_{}", "norm2": "mlp.linear_fc1.layer_norm_{}",
    "qkv": "self_attention.linear_qkv.{}", "out": "self_attention.linear_proj.{}", "up": "mlp.linear_fc1.{}",
    "down": "mlp.linear_fc2.{}", "q_norm": "self_attention.q_layernorm.{}", "k_norm": "self_attention.k_layernorm.{}",
    "layer": "decoder.layers.{}.", "table": "embedding.word_embeddings.weight", "head": "output_layer.weight",
    "places": "embedding.position_embeddings.weight", "final": "decoder.final_layernorm.{}",
    "copy": "output_layer.weight",
}  # fmt: skip
PLAIN = {**CORE, "norm1": "input_layernorm.{}", "norm2": "pre_mlp_layernorm.{}"}
OLD = {
    **CORE, "norm1": "input_layernorm.{}", "norm2": "post_attention_layernorm.{}", "out": "self_attention.dense.{}",
    "qkv": "self_attention.query_key_value.{}", "up": "mlp.dense_h_to_4h.{}", "down": "mlp.dense_4h_to_h.{}",
    "layer": "language_model.encoder.layers.{}.", "table": "language_model.embedding.word_embeddings.weight",
    "places": "language_model.embedding.position_embeddings.weight", "head": "language_model.output_layer.weight",
    "final": "language_model.encoder.final_layernorm.{}", "copy": "word_embeddings_for_head.weight",
}  # fmt: skip
STYLES = {"core": (CORE, ""), "nemo": (CORE, "model."), "plain": (PLAIN, "module."), "old": (OLD, "model.")}


def llama_parts(config: Mapping[str, Any], tensors: Tensors, layer: int) -> Iterator[tuple[str, str, Any]]:
    """(part, weight or bias, tensor; for qkv and up the tensors that are fused)."""
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "out": "self_attn.o_proj",
             "down": "mlp.down_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}  # fmt: skip
    own = {k.removeprefix(f"model.layers.{layer}."): v for k, v in tensors.items() if f".layers.{layer}." in k}
    for kind in ("weight", "bias"):
        for part, name in names.items():
            if f"{name}.{kind}" in own:
                yield part, kind, own[f"{name}.{kind}"]
        if f"self_attn.q_proj.{kind}" in own:
            yield "qkv", kind, [own[f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
        if f"mlp.up_proj.{kind}" in own:
            yield "up", kind, [own[f"mlp.{x}_proj.{kind}"] for x in ("gate", "up")]


def gpt2_parts(config: Mapping[str, Any], tensors: Tensors, layer: int) -> Iterator[tuple[str, str, Any]]:
    names = {"norm1": "ln_1", "norm2": "ln_2", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    for kind in ("weight", "bias"):
        for part, name in names.items():
            x = tensors[f"transformer.h.{layer}.{name}.{kind}"]
            x = x.T if x.dim() == 2 else x
            yield part, kind, [x] if part == "up" else x
        fused = tensors[f"transformer.h.{layer}.attn.c_attn.{kind}"]
        yield "qkv", kind, list((fused.T if kind == "weight" else fused).chunk(3, 0))


def neox_parts(config: Mapping[str, Any], tensors: Tensors, layer: int) -> Iterator[tuple[str, str, Any]]:
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "out": "attention.dense",
             "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}  # fmt: skip
    heads = config["num_attention_heads"]
    for kind in ("weight", "bias"):
        for part, name in names.items():
            x = tensors[f"gpt_neox.layers.{layer}.{name}.{kind}"]
            yield part, kind, [x] if part == "up" else x
        fused = tensors[f"gpt_neox.layers.{layer}.attention.query_key_value.{kind}"]
        by_head = fused.reshape(heads, 3, -1, *fused.shape[1:])
        yield "qkv", kind, [by_head[:, i].reshape(-1, *fused.shape[1:]) for i in range(3)]


WHOLE = {
    "llama": ("model.embed_tokens.weight", "model.norm", "lm_head.weight", llama_parts),
    "gpt2": ("transformer.wte.weight", "transformer.ln_f", "lm_head.weight", gpt2_parts),
    "gpt_neox": ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm", "embed_out.weight", neox_parts),
}


def fused(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """For each KV head its query heads, its key and its value."""
    per_group = [part.chunk(groups, 0) for part in parts]
    return torch.cat([torch.cat([part[g] for part in per_group]) for g in range(groups)])


def share(part: str, kind: str, x: Any, groups: int, tp: int, rank: int) -> torch.Tensor:
    if part == "qkv":
        return fused(x, groups).chunk(tp, 0)[rank]
    if part == "up":
        return torch.cat([piece.chunk(tp, 0)[rank] for piece in x])
    return x.chunk(tp, 1)[rank] if part in ("out", "down") and kind == "weight" else x


def table(x: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """The rows behind the vocabulary are noise, so that reading one would show."""
    rows = -len(x) % (16 * tp)
    return torch.cat([x, torch.full((rows, x.shape[1]), 7.0, dtype=x.dtype)]).chunk(tp, 0)[rank]


def write_megatron(
    hf: Path, out: Path, tp: int, pp: int, style: str = "core", settings: Mapping[str, Any] | None = None,
    *, through: bool = False,
) -> Path:  # fmt: skip
    """`settings` are written as they are given; `through`: layers are counted through the stages."""
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    kind = config["model_type"] if config["model_type"] in WHOLE else "llama"
    embedding, final, head, parts = WHOLE[kind]
    names, prefix = STYLES[style]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    groups = config.get("num_key_value_heads") or config.get("num_attention_heads") or config["n_head"]
    for p in range(pp):
        own = range(p * layers // pp, (p + 1) * layers // pp)
        for t in range(tp):
            rank: Tensors = {}
            for layer in own:
                front = names["layer"].format(layer if through else layer - own[0])
                rank |= {f"{front}{names[part].format(k)}": share(part, k, x, groups, tp, t)
                         for part, k, x in parts(config, tensors, layer)}  # fmt: skip
                rank[f"{front}self_attention._extra_state"] = torch.zeros(3, dtype=torch.uint8)
            if p == 0:
                rank[names["table"]] = table(tensors[embedding], tp, t)
                if "transformer.wpe.weight" in tensors:
                    rank[names["places"]] = tensors["transformer.wpe.weight"]
            if p == pp - 1:
                rank |= {
                    names["final"].format(k): tensors[f"{final}.{k}"]
                    for k in ("weight", "bias")
                    if f"{final}.{k}" in tensors
                }
                if head in tensors:
                    rank[names["head"]] = table(tensors[head], tp, t)
                elif pp > 1:
                    rank[names["copy"]] = table(tensors[embedding], tp, t)
            folder = out / (
                f"tp_rank_{t:02d}_pp_rank_{p:03d}"
                if style == "nemo"
                else f"mp_rank_{t:02d}_{p:03d}"
                if pp > 1
                else f"mp_rank_{t:02d}"
            )
            folder.mkdir(parents=True)
            save_file({prefix + n: x.clone().contiguous() for n, x in rank.items()}, folder / "model.safetensors")
    for name, text in (settings or {}).items():
        (out / name).write_text(text)
    return out


def llama_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """As json.dump(vars(args)) of a training run, in part."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"], "num_attention_heads": heads,
        "group_query_attention": True, "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": config["max_position_embeddings"], "normalization": "RMSNorm",
        "norm_epsilon": config["rms_norm_eps"], "swiglu": True, "add_bias_linear": config.get("mlp_bias", False),
        "add_qkv_bias": config["model_type"] == "qwen2", "qk_layernorm": config["model_type"] == "qwen3",
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"], "position_embedding_type": "rope",
        "rotary_base": config["rope_parameters"]["rope_theta"], "rotary_percent": 1.0,
        "vocab_size": config["vocab_size"],
        "padded_vocab_size": 128, "lr": 1e-4, "optimizer": "adam", "num_experts": None, "window_size": None,
    }  # fmt: skip


def gpt_args(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    neox = config["model_type"] == "gpt_neox"
    return {
        "num_layers": config["num_hidden_layers"] if neox else config["n_layer"],
        "hidden_size": config["hidden_size"] if neox else config["n_embd"],
        "ffn_hidden_size": config["intermediate_size"] if neox else config["n_inner"],
        "num_attention_heads": config["num_attention_heads"] if neox else config["n_head"],
        "max_position_embeddings": config["max_position_embeddings"] if neox else config["n_positions"],
        "normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "vocab_size": config["vocab_size"],
        "untie_embeddings_and_output_weights": neox, "position_embedding_type": "rope" if neox else "learned_absolute",
        "rotary_percent": 0.5, "use_rotary_position_embeddings": neox, **more,
    }  # fmt: skip


NEMO = """# what model_config.yaml holds, in part
mcore_gpt: true
micro_batch_size: 1
tensor_model_parallel_size: {tp}
pipeline_model_parallel_size: {pp}
virtual_pipeline_model_parallel_size: null
encoder_seq_length: 4096
max_position_embeddings: {max_position_embeddings}
num_layers: {num_hidden_layers}
hidden_size: {hidden_size}
ffn_hidden_size: {intermediate_size}
num_attention_heads: {num_attention_heads}
num_query_groups: {num_key_value_heads}
init_method_std: 0.02
normalization: rmsnorm
layernorm_epsilon: 1.0e-06
activation: fast-swiglu
bias: false
share_embeddings_and_output_weights: false
position_embedding_type: rope
rotary_percentage: 1.0
apply_query_key_layer_scaling: false
kv_channels: null
vocab_size: {vocab_size}
tokenizer:
  library: sentencepiece
  type: null
  model: 'nemo:a # b.model'   # a comment
  sentencepiece_legacy: false
optim:
  name: distributed_fused_adam
  betas:
  - 0.9
  - 0.98
  sched: {{}}
data:
  data_prefix: [a, "b"]
  blends:
  - name: x
    weight: 1e-1
nsys_profile:
  ranks: []
"""
