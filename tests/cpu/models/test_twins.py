"""Every family against Hugging Face, through the real config reader, checkpoint and graph, in float32.

The greedy tokens are proved equal by induction: the truth's logits over prompt and our tokens choose, at each position,
the very token that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.formats import F32
from penstock.formats.tolerance import tolerance
from penstock.ir import Graph
from penstock.ir.dialect import built, verify
from penstock.models import build_forward, ignored_tensors, load_config, read_spec, weights
from penstock.models.checkpoint import Checkpoint
from penstock.spec import ModelSpec
from tests.cpu.models.harness import Pool, Request, greedy, load_tensors, request_freqs, run_step
from tests.cpu.models.twins import CASES, save_twin, truth

NEW = 32
PROMPTS = (5, 53, 66)  # lengths; each request reaches its length + NEW - 1 tokens of context


@dataclass
class Twin:
    """A saved model, read back by us and kept by them."""

    truth: Any
    spec: ModelSpec
    graph: Graph
    tensors: dict[str, torch.Tensor]

    def requests(self) -> list[Request]:
        torch.manual_seed(1)
        prompts = [torch.randint(0, 99, (n,)).tolist() for n in PROMPTS]
        return [Request(p, request_freqs(self.spec, len(p) + NEW - 1)) for p in prompts]


def read(case: str, directory: Path, block_size: int) -> Twin:
    model = save_twin(case, directory)
    config = load_config(directory)
    spec = read_spec(config)
    binding = weights(spec, config, "f32")
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(binding, ignored_tensors(spec, config))
    graph = verify(build_forward(spec, binding, "f32", block_size), built())
    return Twin(model, spec, graph, load_tensors(checkpoint, binding))


def assert_same(twin: Twin, requests: Sequence[Request], logits: Sequence[torch.Tensor]) -> None:
    for prompt, request, ours in zip(PROMPTS, requests, logits, strict=False):
        theirs = truth(twin.truth, request.tokens[:-1])[prompt - 1 :]
        difference = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
        assert difference.max() <= tolerance(F32).logits, f"relative difference {difference.max():.2e}"
        assert theirs.argmax(-1).tolist() == request.tokens[prompt:]


@pytest.mark.parametrize("case", CASES)
def test_twin(case: str, tmp_path: Path) -> None:
    twin = read(case, tmp_path, block_size=8)
    alone = twin.requests()[:1]
    single = greedy(partial(run_step, twin.graph, Pool(twin.graph, twin.tensors)), alone, NEW)
    assert_same(twin, alone, single)

    together = twin.requests()
    step = partial(run_step, twin.graph, Pool(twin.graph, twin.tensors, seed=1), pad_tokens=3, pad_rows=1)
    mixed = greedy(step, together, NEW, chunk=7, joins=(4, 0, 2))
    assert_same(twin, together, mixed)
    # Not within a tolerance: neighbours, padding, chunks, other blocks and a later start change no bit.
    assert torch.equal(single[0], mixed[0])
