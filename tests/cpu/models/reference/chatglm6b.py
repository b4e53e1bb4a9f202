"""ChatGLM-6B, the first, as its published configuration and code describe it, and the papers of GLM and GLM-130B.

A prompt is a text, a mark and the token that begins the answer. What stands before that token sees all of itself, and
has its own index as place; the answer has the mark's, and counts from 1 in a second dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.cpu.models.reference import Reference


def spun(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[T,H,d]: number i and number i + d/2 as a complex one, turned by place * 10000^(-2i/d)."""
    a, b = x.double().chunk(2, -1)
    size = x.shape[-1]
    speed = torch.tensor([10000.0 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    turn = torch.exp(1j * place.double()[:, None] * speed)[:, None]
    z = torch.complex(a, b) * turn
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, hidden // heads
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, prefix: int) -> torch.Tensor:
        index = torch.arange(len(x))
        place = torch.where(index < prefix, index, prefix - 1)
        behind = torch.where(index < prefix, 0, index - prefix + 1)
        q, k, v = self.query_key_value(x).view(len(x), self.heads, 3 * self.size).chunk(3, -1)
        half = self.size // 2
        q, k = (torch.cat([spun(e[..., :half], place), spun(e[..., half:], behind)], -1) for e in (q, k))
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.size**0.5
        seen = (index[None] <= index[:, None]) | (index < prefix)[None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return self.dense(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))


class _Mlp(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(hidden, size), nn.Linear(size, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = c["hidden_size"], c["layernorm_epsilon"]
        self.alpha = (2 * c["num_layers"]) ** 0.5
        self.input_layernorm, self.post_attention_layernorm = (nn.LayerNorm(hidden, eps) for _ in range(2))
        self.attention = _Attention(hidden, c["num_attention_heads"])
        self.mlp = _Mlp(hidden, c["inner_hidden_size"])

    def forward(self, x: torch.Tensor, prefix: int) -> torch.Tensor:
        x = self.input_layernorm(x)
        x = self.post_attention_layernorm(self.alpha * x + self.attention(x, prefix))
        return self.alpha * x + self.mlp(x)


class ChatGlm6b(Reference):
    architecture = "ChatGLMModel"

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__(c)
        body = self.transformer = nn.Module()
        body.word_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        body.layers = nn.ModuleList(_Layer(c) for _ in range(c["num_layers"]))
        body.final_layernorm = nn.LayerNorm(c["hidden_size"], c["layernorm_epsilon"])
        self.tied = c.get("tie_word_embeddings", True)
        if not self.tied:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        prefix = tokens.tolist().index(self.config["bos_token_id"])
        assert tokens[prefix - 1] in (self.config["gmask_token_id"], self.config["mask_token_id"])
        x = self.transformer.word_embeddings(tokens)
        for layer in self.transformer.layers:
            x = layer(x, prefix)
        return self.transformer.final_layernorm(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.transformer.word_embeddings.weight.T if self.tied else self.lm_head(x)
