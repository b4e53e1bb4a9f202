"""Baichuan 1 and 2, 7B (rotary) and 13B (ALiBi)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.cpu.models.reference import Reference, RmsNorm, attended, turned


def slopes(heads: int) -> list[float]:
    """Press et al. 2022: a geometric series for a power of two, else that of the next lower one and what is between."""
    if math.log2(heads).is_integer():
        first = 2.0 ** (-8 / heads)
        return [first ** (i + 1) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return slopes(lower) + slopes(2 * lower)[0::2][: heads - lower]


class _Attention(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.rotary = c["num_attention_heads"], "max_position_embeddings" in c
        self.W_pack = nn.Linear(c["hidden_size"], 3 * c["hidden_size"], bias=False)
        self.o_proj = nn.Linear(c["hidden_size"], c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.W_pack(x).view(len(x), 3, self.heads, -1).unbind(1)
        if not self.rotary:
            return self.o_proj(attended(q, k, v, torch.tensor(slopes(self.heads))))
        q, k = (turned(each, 10000.0, each.shape[-1], neighbours=False) for each in (q, k))
        return self.o_proj(attended(q, k, v))


class _Mlp(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn, self.mlp = _Attention(c), _Mlp(c["hidden_size"], c["intermediate_size"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Baichuan(Reference):
    architecture = "BaichuanForCausalLM"

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(_Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.model.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.lm_head.weight
        if len(weight) == 125696:  # Baichuan 2
            weight = weight / weight.norm(dim=1, keepdim=True)
        return x @ weight.T
