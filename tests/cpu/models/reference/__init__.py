"""Families that Transformers does not have, written down from their publications: what their twins are compared with.

Plain modules whose parameters bear the names of the published files. None shares code with the package under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


@dataclass
class Output:
    """As Transformers returns it."""

    logits: torch.Tensor


@dataclass
class Generated:
    """As Transformers' generate returns it, for one prompt."""

    sequences: torch.Tensor
    logits: tuple[torch.Tensor, ...]


class Reference(nn.Module):
    """A model made from its config; the subclass computes the logits of one sequence without a cache."""

    architecture = ""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """i64[T] -> f32[T,E], behind the last norm."""
        raise NotImplementedError

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """f32[T,E] -> f32[T,V]."""
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor, **_: Any) -> Output:
        return Output(torch.stack([self.head(self.hidden(row)) for row in tokens]))

    @torch.no_grad()
    def generate(self, tokens: torch.Tensor, *, max_new_tokens: int, **_: Any) -> Generated:
        """Greedy, one whole pass for each token."""
        rows: list[torch.Tensor] = []
        for _step in range(max_new_tokens):
            rows.append(self.head(self.hidden(tokens[0])[-1:]))
            tokens = torch.cat([tokens, rows[-1].argmax(-1, keepdim=True)], 1)
        return Generated(tokens, tuple(rows))

    def save_pretrained(self, directory: Path, **_: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        config = {"architectures": [self.architecture], "torch_dtype": "float32", **self.config}
        (directory / "config.json").write_text(json.dumps(config))
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, directory / "model.safetensors")


class RmsNorm(nn.Module):
    """Zhang and Sennrich 2019."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def turned(x: torch.Tensor, base: float, size: int, neighbours: bool) -> torch.Tensor:
    """The first `size` numbers of each head as complex ones, turned by their position. x: [T,H,D]."""
    a, b = (x[..., 0:size:2], x[..., 1:size:2]) if neighbours else (x[..., : size // 2], x[..., size // 2 : size])
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = (torch.arange(len(x), dtype=torch.float64)[:, None] * frequency)[:, None]
    z = torch.complex(a.double(), b.double()) * torch.polar(torch.ones_like(angle), angle)
    parts = torch.stack([z.real, z.imag], -1).flatten(-2) if neighbours else torch.cat([z.real, z.imag], -1)
    return torch.cat([parts.to(x.dtype), x[..., size:]], -1)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """Causal attention, query heads in equal shares over KV heads. [T,H,D], [T,K,D], [T,K,D] -> [T,H*D]."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if slopes is not None:
        scores = scores + slopes[:, None, None] * torch.arange(len(k))
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
