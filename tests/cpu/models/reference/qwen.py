"""Qwen 1, for sequences no longer than `seq_length`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.cpu.models.reference import Reference, RmsNorm, attended, turned


class _Attention(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.c, width = c, c["kv_channels"] * c["num_attention_heads"]
        self.c_attn = nn.Linear(c["hidden_size"], 3 * width)
        self.c_proj = nn.Linear(width, c["hidden_size"], bias=not c["no_bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, size = self.c["num_attention_heads"], self.c["kv_channels"]
        q, k, v = self.c_attn(x).chunk(3, -1)
        q, k, v = (each.view(-1, heads, size) for each in (q, k, v))
        q, k = (turned(each, self.c["rotary_emb_base"], size, neighbours=False) for each in (q, k))
        return self.c_proj(attended(q, k, v))


class _Mlp(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        half, bias = c["intermediate_size"] // 2, not c["no_bias"]
        self.w1 = nn.Linear(c["hidden_size"], half, bias=bias)
        self.w2 = nn.Linear(c["hidden_size"], half, bias=bias)
        self.c_proj = nn.Linear(half, c["hidden_size"], bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class _Block(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.ln_1 = RmsNorm(c["hidden_size"], c["layer_norm_epsilon"])
        self.ln_2 = RmsNorm(c["hidden_size"], c["layer_norm_epsilon"])
        self.attn, self.mlp = _Attention(c), _Mlp(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Qwen(Reference):
    architecture = "QWenLMHeadModel"

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.transformer.h = nn.ModuleList(_Block(c) for _ in range(c["num_hidden_layers"]))
        self.transformer.ln_f = RmsNorm(c["hidden_size"], c["layer_norm_epsilon"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(tokens)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x)
