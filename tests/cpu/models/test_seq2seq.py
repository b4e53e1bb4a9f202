"""Encoder-decoders against Hugging Face, through the real config reader, checkpoint and both graphs, in float32.

The tokens are proved equal by induction, as in test_twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.errors import ConfigError
from penstock.formats import F32
from penstock.formats.tolerance import tolerance
from penstock.ir import Graph
from penstock.ir.dialect import built, verify
from penstock.models import build_encoder, build_forward, ignored_tensors, load_config, read_spec, weights
from penstock.models.checkpoint import Checkpoint
from tests.cpu.models.harness import Pool, Request, encode, greedy, load_tensors, run_step
from tests.cpu.models.twins import ENCODERS, save_twin
from tests.facts.tensors import published_config

NEW = 64
SOURCES = (5, 1, 34, 90)  # lengths, the last beyond every table of distances but T5's own


@dataclass
class Twin:
    truth: Any
    start: int
    graph: Graph
    encoder: Graph
    tensors: dict[str, torch.Tensor]

    def requests(self) -> list[Request]:
        torch.manual_seed(1)
        return [Request([self.start], source=torch.randint(3, 99, (n,)).tolist()) for n in SOURCES]

    def pool(self, seed: int = 0) -> Pool:
        graph = Graph((*self.graph.outputs, *self.encoder.outputs), (*self.graph.names, *self.encoder.names))
        return Pool(graph, self.tensors, 128, seed)


def read(case: str, directory: Path, block_size: int = 8) -> Twin:
    model = save_twin(case, directory)
    config = load_config(directory)
    spec = read_spec(config)
    binding = weights(spec, config, "f32")
    checkpoint = Checkpoint.open(directory)
    checkpoint.check(binding, ignored_tensors(spec, config))
    graph = verify(build_forward(spec, binding, "f32", block_size), built())
    encoder = build_encoder(spec, binding, "f32", block_size)
    assert encoder is not None
    return Twin(
        model, config["decoder_start_token_id"], graph, verify(encoder, built()), load_tensors(checkpoint, binding)
    )


@torch.no_grad()
def assert_same(twin: Twin, requests: Sequence[Request], logits: Sequence[torch.Tensor]) -> None:
    for request, ours in zip(requests, logits, strict=True):
        given = {"input_ids": torch.tensor([request.source]), "decoder_input_ids": torch.tensor([request.tokens[:-1]])}
        theirs = twin.truth(**given, use_cache=False).logits[0]
        difference = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
        assert difference.max() <= tolerance(F32).logits, f"relative difference {difference.max():.2e}"
        assert theirs.argmax(-1).tolist() == request.tokens[1:]


@pytest.mark.parametrize("case", ENCODERS)
def test_twin(case: str, tmp_path: Path) -> None:
    twin = read(case, tmp_path)
    alone, pool = twin.requests(), twin.pool()
    for request in alone[:1]:
        encode(twin.encoder, pool, [request])
    single = greedy(partial(run_step, twin.graph, pool), alone[:1], NEW)
    assert_same(twin, alone[:1], single)

    together, pool = twin.requests(), twin.pool(seed=1)
    encode(twin.encoder, pool, together, pad_tokens=3, pad_rows=1)
    step = partial(run_step, twin.graph, pool, pad_tokens=3, pad_rows=1)
    mixed = greedy(step, together, NEW, joins=(4, 0, 2, 0))
    assert_same(twin, together, mixed)
    # Not within a tolerance: neighbours, padding, other blocks and a later start change no bit.
    assert torch.equal(single[0], mixed[0])


def test_transformers_says_the_same_of_the_first(tmp_path: Path) -> None:
    """Its own generate, with its cache."""
    twin = read("t5", tmp_path)
    request, pool = twin.requests()[2], twin.pool()
    encode(twin.encoder, pool, [request])
    greedy(partial(run_step, twin.graph, pool), [request], NEW)
    out = twin.truth.generate(
        torch.tensor([request.source]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert out[0].tolist() == request.tokens


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("relative_attention_num_buckets", 30), ("relative_attention_max_distance", 16), ("is_encoder_decoder", False),
        ("feed_forward_proj", "gated-mystery"), ("dense_act_fn", "silu"), ("d_kv", 0),
    ],
)  # fmt: skip
def test_what_t5_is_not_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        read_spec({**published_config("t5-small"), key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("normalize_before", True), ("decoder_attention_heads", 5), ("extra_pos_embeddings", 0), ("new_key", 1)],
)
def test_what_bart_is_not_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        read_spec({**published_config("bart-base"), key: value})
