"""Tiny models of every family, made and saved by Hugging Face: the source of truth for the whole path from disk."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.cpu.models import cases
from tests.cpu.models.reference.baichuan import Baichuan
from tests.cpu.models.reference.chatglm import ChatGlm
from tests.cpu.models.reference.grok import Grok
from tests.cpu.models.reference.qwen import Qwen

REFERENCES = {"baichuan": Baichuan, "chatglm": ChatGlm, "grok-1": Grok, "qwen": Qwen}

SIZES = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


_SHORT = [1.0, 1.1, 1.25, 1.5, 2.0, 2.5]
_LONG = [1.0, 1.7, 2.9, 4.1, 7.7, 8.0]
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {}  # of encoder-decoders, which have tests of their own
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": None, "tie_word_embeddings": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-head-dim": ("llama", {"head_dim": 20}),
    "llama-theta": ("llama", rope("default", 500.0)),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-llama3": ("llama", rope("llama3", 500.0, original_max_position_embeddings=32, **_LLAMA3)),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-yarn-stated": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3, beta_fast=16, beta_slow=2),
    ),
    "llama-yarn-mscale": (
        "llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5, truncate=False),
    ),
    "llama-dynamic-below": ("llama", rope("dynamic", factor=2.0)),
    "llama-dynamic-above": ("llama", {"max_position_embeddings": 48, **rope("dynamic", factor=2.0)}),
    "llama-longrope-short": (
        "llama",
        rope("longrope", original_max_position_embeddings=128, short_factor=_SHORT, long_factor=_LONG, factor=8.0),
    ),
    "llama-longrope-long": (
        "llama",
        rope("longrope", original_max_position_embeddings=32, short_factor=_SHORT, long_factor=_LONG, factor=4.0),
    ),
    # 70 lies between the lengths of the test's requests: neighbours on both sides of the switch share steps.
    "llama-longrope-both": (
        "llama",
        rope("longrope", original_max_position_embeddings=70, short_factor=_SHORT, long_factor=_LONG),
    ),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 11, "head_dim": 16}),
    "mistral-window-1": ("mistral", {"sliding_window": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-mqa": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-yarn": ("qwen2", rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32)),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases-tied": ("qwen3", {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-windows": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma-mqa": ("gemma", {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma-untied-biases": ("gemma", {"head_dim": 16, "attention_bias": True}),
}  # fmt: skip


AMENDED: dict[str, Any] = {}  # what a case does to Transformers' model before it is saved

for _found in pkgutil.iter_modules(cases.__path__):
    _module = importlib.import_module(f"{cases.__name__}.{_found.name}")
    CASES |= getattr(_module, "CASES", {})
    ENCODERS |= getattr(_module, "ENCODERS", {})
    AMENDED |= getattr(_module, "AMENDED", {})


def _sizes(family: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Of SIZES, those that the family's config knows and the case does not state under the family's own name; none
    for a module of our own, whose case states all."""
    if family in REFERENCES:
        return {}
    config = transformers.CONFIG_MAPPING[family]
    fields, names = config.__dataclass_fields__, config.attribute_map
    return {k: v for k, v in SIZES.items() if k in fields or (k in names and names[k] not in more)}


def save_twin(case: str, directory: Path, changes: Mapping[str, Any] | None = None, **save: Any) -> Any:
    """Build the case's model with random weights, save it to `directory`, and return it in float32.

    `changes`: keys of the config that differ from the case's.
    """
    family, more = CASES.get(case) or ENCODERS[case]
    torch.manual_seed(sum(map(ord, case)))
    model = _made(family, more, changes or {})
    with torch.no_grad():
        AMENDED.get(case, lambda model: None)(model)
        for parameter in model.parameters():
            # Every norm and bias differs from its neutral start, and matrices make logits that tell tokens apart.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.3 * parameter.shape[-1] ** -0.5)
    model.eval().save_pretrained(directory, **save)
    return model


def _made(family: str, keys: dict[str, Any], changes: Mapping[str, Any]) -> Any:
    """Transformers' model; where it has none a module of our own, whose config is the case's alone."""
    if family in REFERENCES:
        return REFERENCES[family]({key: changes.get(key, value) for key, value in keys.items()})
    config = transformers.AutoConfig.for_model(family, **{**_sizes(family, keys), **keys, **changes})
    config.architectures = None  # save_pretrained fills it in
    known = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return known.from_config(config, attn_implementation="eager", dtype=torch.float32)


@torch.no_grad()
def truth(model: Any, tokens: list[int]) -> torch.Tensor:
    """Logits of every position, f32[len(tokens), V], in one pass without a cache."""
    model(torch.tensor([[0]]), use_cache=False)  # dynamic rope keeps the longest length seen until a short pass
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits
