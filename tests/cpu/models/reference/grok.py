"""Grok-1 in the form that HPC-AI published for Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.cpu.models.reference import Reference, turned


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


class _Attention(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width = c["hidden_size"] // c["num_attention_heads"]
        self.heads, self.kv, self.factor = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["attn_output_multiplier"],
        )
        self.cap = c["max_attn_value"]
        sizes = {"q_proj": self.heads, "k_proj": self.kv, "v_proj": self.kv}
        for name, heads in sizes.items():
            setattr(self, name, nn.Linear(c["hidden_size"], heads * width, bias=False))
        self.o_proj = nn.Linear(self.heads * width, c["hidden_size"], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k, v = (p(x).unflatten(-1, (self.kv, -1)) for p in (self.k_proj, self.v_proj))
        q, k = (turned(each, 10000.0, each.shape[-1], neighbours=False) for each in (q, k))
        k, v = (each.repeat_interleave(self.heads // self.kv, 1) for each in (k, v))
        scores = self.cap * (torch.einsum("qhd,khd->hqk", q, k) * self.factor / self.cap).tanh()
        hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


class _Expert(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, size, bias=False)
        self.linear_v = nn.Linear(hidden, size, bias=False)
        self.linear_1 = nn.Linear(size, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_1(nn.functional.gelu(self.linear(x)) * self.linear_v(x))


class _Experts(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.chosen = c["num_experts_per_tok"]
        self.gate = nn.Linear(c["hidden_size"], c["num_experts"], bias=False)
        self.experts = nn.ModuleList(_Expert(c["hidden_size"], c["intermediate_size"]) for _ in range(c["num_experts"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every expert of every token; those that were not chosen count nothing."""
        shares = self.gate(x).softmax(-1)
        least = shares.topk(self.chosen, -1).values[:, -1:]
        shares = shares * (shares >= least)
        return sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class _Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            setattr(self, name, _Norm(c["hidden_size"], c["rms_norm_eps"]))
        self.attn, self.moe_block = _Attention(c), _Experts(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.post_attn_norm(self.attn(self.pre_attn_norm(x)))
        return x + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x)))


class Grok(Reference):
    architecture = "Grok1ModelForCausalLM"

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(_Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = _Norm(c["hidden_size"], c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens) * self.config["embedding_multiplier_scale"]
        for layer in self.model.layers:
            x = layer(x)
        return self.model.norm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.model.embed_tokens.weight if self.config["tie_word_embeddings"] else self.lm_head.weight
        return nn.functional.linear(x, weight) * self.config["output_multiplier_scale"]
