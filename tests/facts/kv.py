"""What a published model keeps of a context, from its config alone: bytes at two a number, all layers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.facts.shapes import head_size, kv_heads

Config = dict[str, Any]
LATENT = ("deepseek_v2", "deepseek_v3")
# One layer in so many attends to everything, the last of each group; the others have the window.
PATTERN = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
ALL_WINDOWED = ("mistral", "phi3", "starcoder2")
SPELLINGS = {
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "head_dim": ("kv_channels",),
}


@dataclass(frozen=True)
class Kept:
    """full, windowed: bytes a token in layers that keep every token, or the last `window`. cross: bytes a token of the
    encoder's. state: numbers a sequence, whatever its length (the convolution's last inputs, the recurrent state)."""

    full: int
    windowed: int = 0
    window: int = 0
    cross: int = 0
    state: int = 0


def kept(config: Config) -> Kept:
    c = _spelled(config)
    family = c["model_type"]
    if family in LATENT:
        return Kept(2 * c["num_hidden_layers"] * (c["kv_lora_rank"] + c["qk_rope_head_dim"]))
    if family == "mamba2":
        return Kept(0, state=c["num_hidden_layers"] * _mamba2_state(c))
    if family == "t5":
        each = 4 * c["num_heads"] * c["d_kv"] * (c.get("num_decoder_layers") or c["num_layers"])
        return Kept(each, cross=each)
    if family == "bart":
        return Kept(4 * c["d_model"] * c["decoder_layers"], cross=4 * c["d_model"] * c["decoder_layers"])
    layer = 4 * kv_heads(c) * head_size(c)
    if family == "qwen3_next":
        full = c["num_hidden_layers"] // c["full_attention_interval"]
        return Kept(layer * full, state=(c["num_hidden_layers"] - full) * _delta_state(c))
    windowed, window = _windowed(c)
    full = layer * (c["num_hidden_layers"] - windowed)
    return Kept(full, layer * windowed, window if windowed else 0)


def _spelled(config: Config) -> Config:
    c = dict(config)
    for ours, theirs in SPELLINGS.items():
        c.update((ours, c[name]) for name in theirs if name in c and ours not in c)
    if "attn_config" in c and "kv_n_heads" in c["attn_config"]:
        c["num_key_value_heads"] = c["attn_config"]["kv_n_heads"]
    if c["model_type"] in ("falcon", "RefinedWebModel") and "num_kv_heads" not in c and c["multi_query"]:
        c["num_key_value_heads"] = 1
    return c


def _windowed(c: Config) -> tuple[int, int]:
    """(layers with a window, the window); one that is not shorter than the longest context is none."""
    layers, window = c["num_hidden_layers"], c.get("sliding_window") or 0
    if window >= c.get("max_position_embeddings", 131072):
        return 0, 0
    if "layer_types" in c:
        return c["layer_types"].count("sliding_attention"), window
    if c["model_type"] in PATTERN:
        return layers - layers // PATTERN[c["model_type"]], window
    return (layers, window) if window and c["model_type"] in ALL_WINDOWED else (0, 0)


def _mamba2_state(c: Config) -> int:
    inner = c["expand"] * c["hidden_size"]
    return int((c["conv_kernel"] - 1) * (inner + 2 * c["n_groups"] * c["state_size"]) + inner * c["state_size"])


def _delta_state(c: Config) -> int:
    keys, heads = c["linear_num_key_heads"] * c["linear_key_head_dim"], c["linear_num_value_heads"]
    size = c["linear_value_head_dim"]
    conv = (c["linear_conv_kernel_dim"] - 1) * (2 * keys + heads * size)
    return int(conv + heads * c["linear_key_head_dim"] * size)
