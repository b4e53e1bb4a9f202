"""Encoder-decoders of random weights on the GPU: what the CPU says in float32, some joining late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams

pytestmark = pytest.mark.gpu
T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True, "d_model": 128,
    "d_kv": 64, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 512,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_max_distance": 40,
    "decoder_start_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART: dict[str, Any] = {
    "architectures": ["BartForConditionalGeneration"], "model_type": "bart", "is_encoder_decoder": True,
    "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 512,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_position_embeddings": 256,
    "decoder_start_token_id": 2, "forced_bos_token_id": 7, "eos_token_id": 1,
}  # fmt: skip
LENGTHS = (5, 1, 130, 64, 65, 33, 90, 17)


def said(config: dict[str, Any], device: str, folder: Path) -> list[Any]:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in LENGTHS]
    limits: dict[str, Any] = {"max_batch_size": 5, "max_num_tokens": 160, "max_seq_len": 160}
    how = {"device": device, "dtype": "float32", "weights": "random", "skip_tokenizer_init": True}
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=0)
    with LLM(folder, cache_dir=folder / "cache", **how, **limits) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        again = llm.generate({"prompt_token_ids": prompts[2]}, params)
        assert again[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids
        assert llm.stats()["kv_cache_usage"] == 0
        if device == "cuda":
            assert llm.stats()["reference_nodes"] == 0 and llm.stats()["allocations"] == 0
    return [output.outputs[0] for output in outputs]


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_the_gpu_says_what_the_cpu_says(config: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (said(config, device, tmp_path / device) for device in ("cuda", "cpu"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids
        assert abs(a.cumulative_logprob - b.cumulative_logprob) < 1e-2
