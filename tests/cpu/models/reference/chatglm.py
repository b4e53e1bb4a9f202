"""ChatGLM 2 and 3, and GLM-4 in its first form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.cpu.models.reference import Reference, RmsNorm, attended, turned


class _Attention(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.size = c["num_attention_heads"], c["kv_channels"]
        self.groups = c["multi_query_group_num"] if c["multi_query_attention"] else self.heads
        self.base = 10000.0 * c.get("rope_ratio", 1)
        rows = (self.heads + 2 * self.groups) * self.size
        bias = c["add_bias_linear"]
        self.query_key_value = nn.Linear(c["hidden_size"], rows, bias=bias or c["add_qkv_bias"])
        self.dense = nn.Linear(self.heads * self.size, c["hidden_size"], bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.query_key_value(x).view(len(x), -1, self.size)
        q, k, v = parts.split([self.heads, self.groups, self.groups], 1)
        q, k = (turned(each, self.base, self.size // 2, neighbours=True) for each in (q, k))
        return self.dense(attended(q, k, v))


class _Mlp(nn.Module):
    def __init__(self, hidden: int, size: int, bias: bool) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, 2 * size, bias=bias)
        self.dense_4h_to_h = nn.Linear(size, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * up)


class _Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(c["hidden_size"], c["layernorm_epsilon"])
        self.post_attention_layernorm = RmsNorm(c["hidden_size"], c["layernorm_epsilon"])
        self.self_attention = _Attention(c)
        self.mlp = _Mlp(c["hidden_size"], c["ffn_hidden_size"], c["add_bias_linear"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class ChatGlm(Reference):
    architecture = "ChatGLMModel"

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        body = self.transformer = nn.Module()
        body.embedding, body.encoder, body.rotary_pos_emb = nn.Module(), nn.Module(), nn.Module()
        body.embedding.word_embeddings = nn.Embedding(c["padded_vocab_size"], c["hidden_size"])
        body.encoder.layers = nn.ModuleList(_Layer(c) for _ in range(c["num_layers"]))
        body.encoder.final_layernorm = RmsNorm(c["hidden_size"], c["layernorm_epsilon"])
        body.rotary_pos_emb.register_buffer("inv_freq", torch.ones(c["kv_channels"] // 4))  # in the files, unread
        body.output_layer = nn.Linear(c["hidden_size"], c["padded_vocab_size"], bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer.embedding.word_embeddings(tokens)
        for layer in self.transformer.encoder.layers:
            x = layer(x)
        return self.transformer.encoder.final_layernorm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return self.transformer.output_layer(x)
