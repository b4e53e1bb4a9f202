"""Classic families: configs that are refused, keys and tensors in several spellings, facts that are easily lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import CheckpointError, ConfigError
from penstock.models import declared, load_config, read_spec
from penstock.models.checkpoint import SINGLE
from penstock.models.directory import ModelDirectory
from penstock.spec import Alibi, ModelSpec, Rope
from tests.cpu.models.twins import save_twin

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 6144, "num_hidden_layers": 4, "num_attention_heads": 64,
    "intermediate_size": 24576, "vocab_size": 50432, "rotary_pct": 0.25, "rotary_emb_base": 10000,
}  # fmt: skip
GPTJ = GPT2 | {"model_type": "gptj", "rotary_dim": 64}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
OPT, FALCON = SIZES | {"model_type": "opt", "ffn_dim": 128}, SIZES | {"model_type": "falcon"}
PHI, STARCODER2 = SIZES | {"model_type": "phi"}, SIZES | {"model_type": "starcoder2", "intermediate_size": 256}
BLOOM = {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 99}
MPT = {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_seq_len": 2048}
BIGCODE = GPT2 | {"model_type": "gpt_bigcode"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (GPT2 | {"n_embd": 767}, "n_embd = 767 .*12 heads"),
    (GPT2 | {"hidden_size": 512}, "hidden_size = 512|n_embd = .*same as n_embd = 768"),
    (GPT2 | {"n_ctx": 512}, "n_ctx = 512"),
    (GPT2 | {"activation_function": "tanh"}, "activation_function = 'tanh' .*gelu_new"),
    (GPT2 | {"add_cross_attention": True}, "add_cross_attention = True"),
    (GPT2 | {"rotary_dim": 64}, "unknown key rotary_dim"),
    (NEOX | {"rotary_pct": 0.27}, "rotary_pct = 0.27 .*even"),
    (NEOX | {"rotary_emb_base": 10000, "rope_theta": 500}, "same as rotary_emb_base = 10000"),
    (GPTJ | {"rotary_dim": None}, "rotary_dim = None"),
    (GPTJ | {"rotary_dim": 66}, "rotary_dim = 66 .*64"),
    (GPTJ | {"rotary": False}, "rotary = False"),
    (OPT | {"word_embed_proj_dim": 0}, "word_embed_proj_dim = 0"),
    (PHI | {"qk_layernorm": True}, "qk_layernorm = True"),
    (PHI | {"num_key_value_heads": 3}, "num_attention_heads = 4 .*multiple of the 3"),
    (STARCODER2 | {"norm_type": "rms_norm"}, "norm_type = 'rms_norm'"),
    (STARCODER2 | {"mlp_type": "gated"}, "mlp_type = 'gated'"),
    (FALCON | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn = 2 .*new form"),
    (FALCON | {"new_decoder_architecture": True, "parallel_attn": False}, "num_ln_in_parallel_attn"),
    (FALCON | {"ff_factor": 8}, "ff_factor = 8"),
    (BLOOM | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
    (BLOOM | {"n_inner": 128}, "n_inner = 128"),
    (MPT | {"norm_type": "rmsnorm"}, "norm_type = 'rmsnorm'"),
    (MPT | {"attn_config": {"alibi": False}}, "attn_config: alibi = False"),
    (MPT | {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config: attn_type"),
    (MPT | {"attn_config": {"prefix_lm": True}}, "attn_config: prefix_lm = True"),
    (MPT | {"attn_config": {"kv_n_heads": 2}}, "attn_config: unknown key kv_n_heads"),
    (MPT | {"logit_scale": "half"}, "logit_scale = 'half'"),
    (BIGCODE | {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    (BIGCODE | {"scale_attn_weights": False}, "scale_attn_weights = False"),
    (BIGCODE | {"scale_attn_weights": 1}, "scale_attn_weights = 1 "),
    (
        SIZES | {"model_type": "mistral", "intermediate_size": 80, "num_key_value_heads": 2, "sliding_window": 0},
        "sliding_window = 0",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(config)


@pytest.mark.parametrize("config", [GPT2, NEOX, GPTJ, OPT, FALCON, PHI, STARCODER2, BLOOM, MPT, BIGCODE])
def test_every_key_matters(config: dict[str, Any]) -> None:
    """What is refused above is refused for its own sake, and a key misspelt is one unknown, or one missing."""
    assert read_spec(config).hidden_size in (64, 768, 6144)
    for key in config.keys() - {"model_type"}:
        with pytest.raises(ConfigError, match=f"{key}_x|no key|is not implemented"):
            read_spec({f"{k}_x" if k == key else k: v for k, v in config.items()})


def test_words_of_several_versions() -> None:
    common = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 1024}
    assert read_spec(GPT2) == read_spec({"model_type": "gpt2", "vocab_size": 50257, **common})
    rope = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    plain = {k: v for k, v in NEOX.items() if not k.startswith("rotary")}
    assert read_spec(NEOX) == read_spec(plain | {"rope_parameters": rope})
    old = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "architectures": ["RWForCausalLM"]}
    grouped = read_spec(old | {"model_type": "RefinedWeb", "n_head_kv": 2})
    assert grouped == read_spec(FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2})
    assert read_spec(old | {"model_type": "RefinedWebModel", "multi_query": True}) == read_spec(FALCON)


def test_facts_that_are_easily_lost() -> None:
    def first(config: dict[str, Any]) -> Any:
        return read_spec(config).layers[0]

    assert read_spec(GPT2).tied_head and read_spec(BLOOM).tied_head and not read_spec(NEOX).tied_head
    assert first(GPTJ).mixer.rope == Rope(10000.0, 64, interleaved=True)
    assert first(NEOX).mixer.rope.dim == 24 and first(PHI).mixer.rope.dim == 8
    assert [first(c).feedforward.act for c in (GPT2, NEOX, OPT, FALCON, MPT)] == [
        "gelu_tanh", "gelu", "relu", "gelu", "gelu",
    ]  # fmt: skip
    assert first(FALCON).mixer.kv_heads == 1 and first(FALCON).feedforward_norm is None
    assert first(FALCON | {"alibi": True}).mixer.bias == Alibi((0.0625, 0.015625, 0.00390625, 0.0009765625))
    assert first(STARCODER2 | {"sliding_window": 4096}).mixer.window == 4096
    assert read_spec(OPT | {"do_layer_norm_before": False}).final_norm is None
    assert read_spec(MPT | {"logit_scale": "inv_sqrt_d_model"}).logit_scale == 0.125
    assert first(MPT | {"attn_config": {"clip_qkv": 8, "alibi_bias_max": 16}}).mixer.clip == 8.0


# Tensors by other names


def spelt(directory: Path, name: Callable[[str], str]) -> None:
    """Save the twin's tensors under other names."""
    tensors = load_file(directory / SINGLE)
    save_file({name(n): t for n, t in tensors.items()}, directory / SINGLE)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    model = ModelDirectory.open(directory)
    checkpoint = model.checkpoint()
    return {name: checkpoint.read(name) for name in declared(model.binding("f32"))}


@pytest.mark.parametrize(
    ("case", "prefix", "left"), [("gpt2", "transformer.", ""), ("bloom", "transformer.", ""), ("opt", "model.", "")]
)
def test_files_saved_without_the_head(case: str, prefix: str, left: str, tmp_path: Path) -> None:
    save_twin(case, tmp_path)
    before = read_all(tmp_path)
    spelt(tmp_path, lambda name: re.sub(f"^{re.escape(prefix)}", left, name))
    assert not any(name.startswith(prefix) for name in load_file(tmp_path / SINGLE))
    after = read_all(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_a_tensor_in_two_spellings(tmp_path: Path) -> None:
    save_twin("gpt2", tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    save_file(tensors | {"wpe.weight": tensors["transformer.wpe.weight"].clone()}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"two spellings of 'transformer\.wpe\.weight'"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("case", "buffer"),
    [
        ("gpt2", "transformer.h.1.attn.bias"),
        ("gpt2", "h.1.attn.masked_bias"),
        ("gptj", "transformer.h.0.attn.masked_bias"),
        ("neox", "gpt_neox.layers.0.attention.bias"),
        ("neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ],
)
def test_masks_that_old_files_hold(case: str, buffer: str, tmp_path: Path) -> None:
    save_twin(case, tmp_path)
    save_file(load_file(tmp_path / SINGLE) | {buffer: torch.zeros(1)}, tmp_path / SINGLE)
    read_all(tmp_path)
    save_file(load_file(tmp_path / SINGLE) | {f"{buffer}s": torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=re.escape(f"{buffer}s")):
        read_all(tmp_path)


def test_specs_survive_json(tmp_path: Path) -> None:
    for config in (GPT2, NEOX, GPTJ, OPT, FALCON | {"alibi": True}, PHI, STARCODER2, BLOOM, MPT, BIGCODE):
        spec = read_spec(config)
        assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    save_twin("mpt-storywriter", tmp_path)
    assert read_spec(load_config(tmp_path)).layers[0].mixer.clip == 0.4
