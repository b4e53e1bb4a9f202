"""Rotary frequencies of every scaling against transformers' own functions, at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from penstock.models import read_spec
from penstock.spec import Rope, attention_factor, inverse_frequencies

_SHORT = [1.0 + i / 40 for i in range(64)]
_LONG = [1.0 + i * i / 50 for i in range(64)]
LONGROPE = {"short_factor": _SHORT, "long_factor": _LONG}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    "yarn-no-original": {"rope_type": "yarn", "factor": 2.0},
    "yarn-betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 24, "beta_slow": 3, "truncate": False},
    "yarn-narrow": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 1.0001, "beta_slow": 1, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn-attention": {"rope_type": "yarn", "factor": 40.0, "attention_factor": 0.8},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 32.0, **LONGROPE},
    "longrope-ratio": {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONGROPE},
    "longrope-attention": {"rope_type": "longrope", "attention_factor": 1.19, "factor": 2.0, **LONGROPE},
}  # fmt: skip
LENGTHS = (100, 4096, 4097, 16384, 16385, 30000)


def config_of(name: str) -> LlamaConfig:
    parameters = {"rope_theta": 10000.0, **SCALINGS[name]}
    more = {"num_attention_heads": 32, "hidden_size": 4096, "max_position_embeddings": 16384}
    return LlamaConfig(rope_parameters=parameters, architectures=["LlamaForCausalLM"], **more)


def rope_of(config: LlamaConfig) -> Rope:
    return read_spec(config.to_dict()).layers[0].mixer.rope


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", LENGTHS)
def test_frequencies_and_factor(name: str, length: int) -> None:
    config = config_of(name)
    kind = SCALINGS[name]["rope_type"]
    theirs = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    frequencies, factor = theirs(config, seq_len=length)
    rope = rope_of(config)
    # 2e-6: they compute in float32, and the base's power loses a few bits there
    torch.testing.assert_close(torch.tensor(inverse_frequencies(rope, length)), frequencies, rtol=2e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


def test_which_depend_on_the_request() -> None:
    by_request = {name for name in SCALINGS if rope_of(config_of(name)).by_request}
    assert by_request == {name for name in SCALINGS if name.startswith(("dynamic", "longrope"))}
    for name in SCALINGS:
        rope = rope_of(config_of(name))
        same = inverse_frequencies(rope, 100) == inverse_frequencies(rope, 30000)
        assert same == (not rope.by_request)
        assert inverse_frequencies(rope) == inverse_frequencies(rope, 100)
