"""The one workload that every figure is measured on: shapes, prompts and lengths, fixed."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from penstock.errors import OptionError
from penstock.text.files import TOKENIZER

LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA31_8B: dict[str, Any] = LLAMA2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
LLAMA31_8B_LONG: dict[str, Any] = LLAMA31_8B | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
MIXTRAL_8_LAYERS: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,  # of 32: the whole model does not fit every machine's disk
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = LLAMA2_7B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: Mapping[str, dict[str, Any]] = {
    "llama2-7b": LLAMA2_7B,
    "llama3.1-8b": LLAMA31_8B,
    "llama3.1-8b-long": LLAMA31_8B_LONG,
    "mixtral-8x7b-8-layers": MIXTRAL_8_LAYERS,
    "tiny": TINY,
}
VOCAB = 30000  # largest token id of a prompt, where the vocabulary has it
MIXED = 512  # requests of the mixed workload
MIXED_PROMPT, MIXED_NEW = (64, 1024), (32, 512)  # tokens, both ends included
TTFT_LENGTHS = (10, 50, 100, 150, 200, 250, 300, 350, 400)


def write_model(name: str, folder: Path) -> Path:
    """A directory with the config of a workload model, a tokenizer, and no weights: built with weights="random"."""
    if name not in MODELS:
        raise OptionError(f"no workload model {name!r}; there are {', '.join(MODELS)}")
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    aside = directory / f"{TOKENIZER}.{os.getpid()}"  # another benchmark may be reading it
    _tokenizer(MODELS[name]["vocab_size"]).save(str(aside))
    aside.replace(directory / TOKENIZER)
    return directory


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level: three marks, the bytes, and then words, so that each token costs what text costs."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = itertools.islice(itertools.chain(("<unk>", "<s>", "</s>"), bytes_, _words()), vocab_size)
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def _words() -> Iterator[str]:
    """Without end, and none twice. Shares as of a real vocabulary's tokens (Tekken, 131,072), which what a grammar's
    masks take depends on: 57 % begin with a space, 0.4 % hold a quote."""
    numbers, seen = random.Random(0), set[str]()
    while True:
        word, kind = "".join(numbers.choices(ascii_lowercase, k=numbers.randint(2, 8))), numbers.random()
        word = f"Ġ{word}" if kind < 0.57 else f'{word}"' if kind < 0.573 else word
        if word not in seen:
            seen.add(word)
            yield word


def prompt(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Token ids from 3 to `vocab`, the same for the same seed."""
    numbers = random.Random(seed)
    return [numbers.randint(3, vocab) for _ in range(length)]


def mixed_requests(count: int = MIXED, seed: int = 0, vocab: int = VOCAB) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) of the in-flight batching workload: both lengths uniform."""
    numbers = random.Random(seed)
    return [
        (prompt(numbers.randint(*MIXED_PROMPT), seed * 100003 + i, vocab), numbers.randint(*MIXED_NEW))
        for i in range(count)
    ]


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q / 100 * (len(ordered) - 1)))]
