"""The facts agree with each other, with transformers, and with the counts their publishers state."""

from __future__ import annotations

import json
import zlib
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.facts.catalog import CATALOG
from tests.facts.tensors import (
    CONFIGS,
    INDEX_BYTES,
    LAYOUTS,
    PARAMETERS,
    Layout,
    _tensors,
    is_buffer,
    parameters,
    published_config,
    tensor_names,
)
from tests.facts.trtllm import write_trtllm

NAMES = sorted(LAYOUTS)


def test_every_layout_has_a_config_and_a_count() -> None:
    published = {path.stem for path in CONFIGS.glob("*.json")}
    assert not LAYOUTS.keys() & CATALOG.keys()
    assert {n for n in published if not n.endswith(".transformers5")} == {*LAYOUTS, *CATALOG} == set(PARAMETERS)
    assert {name.removesuffix(".transformers5") for name in published} == {*LAYOUTS, *CATALOG}


@pytest.mark.parametrize("name", NAMES)
def test_shapes_add_up_to_the_published_count(name: str) -> None:
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(INDEX_BYTES))
def test_published_index_sizes_settle_the_rotary_buffers(name: str) -> None:
    size_of_buffer = 4 if name == "Llama-2-70b-hf" else 2
    total = sum(prod(s) * (size_of_buffer if is_buffer(n) else 2) for n, s in tensor_names(name).items())
    assert total == INDEX_BYTES[name]


def test_oddities_are_there() -> None:
    assert tensor_names("Llama-2-7b-hf")["model.layers.31.self_attn.rotary_emb.inv_freq"] == (64,)
    assert "lm_head.weight" in tensor_names("Qwen3-0.6B") and published_config("Qwen3-0.6B")["tie_word_embeddings"]
    assert "lm_head.weight" not in tensor_names("gemma-2b") and "tie_word_embeddings" not in published_config(
        "gemma-2b"
    )
    assert tensor_names("Qwen2-7B")["model.layers.0.self_attn.k_proj.bias"] == (512,)
    assert tensor_names("Qwen3-8B")["model.layers.35.self_attn.q_norm.weight"] == (128,)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = published_config(name)
    for ours in ("auto_map", "torch_dtype", "transformers_version"):
        config.pop(ours, None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        )
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    ours_tied = LAYOUTS[name].tied
    weights = {n: s for n, s in tensor_names(name).items() if not is_buffer(n)}
    if ours_tied:
        weights.pop("lm_head.weight", None)
    assert weights == expected


# The TensorRT-LLM writer

TINY: dict[str, tuple[Layout, dict[str, Any]]] = {
    "llama": (Layout(5, 32, 4, 2, 8, 48, 33), {"attention_bias": False, "rope_theta": 500000.0}),
    "mistral": (Layout(2, 32, 4, 4, 8, 48, 32), {"sliding_window": 16}),
    "qwen2": (
        Layout(3, 32, 4, 2, 8, 48, 33, qkv_bias=True, tied=True, has_lm_head=False),
        {"tie_word_embeddings": True},
    ),
    "qwen3": (Layout(2, 32, 4, 1, 16, 48, 36, qk_norm=True), {"head_dim": 16}),
    "gemma": (Layout(2, 32, 4, 1, 16, 48, 32, tied=True, has_lm_head=False), {"head_dim": 16, "hidden_act": "gelu"}),
}
CLASS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma"}


def tiny(family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A config and random float32 tensors of a tiny model; seeded by name, so each tensor differs from all others."""
    layout, more = TINY[family]
    config = {
        "architectures": [f"{CLASS[family]}ForCausalLM"],
        "model_type": family,
        "hidden_act": "silu",
        "hidden_size": layout.hidden,
        "intermediate_size": layout.inner,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "vocab_size": layout.vocab,
        **more,
    }
    tensors = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in _tensors(layout)
    }
    return config, tensors


def merge(path: Path, family: str) -> dict[str, torch.Tensor]:
    """Read the ranks back into HF names: an independent inverse, by the published layouts alone."""
    config = json.loads((path / "config.json").read_text())
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    ranks = [load_file(path / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    result: dict[str, torch.Tensor] = {}
    offset = 0
    for stage in range(pp):
        group = ranks[stage * tp : (stage + 1) * tp]
        count = 1 + max(int(n.split(".")[2]) for n in group[0] if ".layers." in n)
        for name in group[0]:
            hf = _hf_name(name, offset)
            for target, tensor in _join(name, hf, [rank[name] for rank in group], config, family).items():
                assert target not in result
                result[target] = tensor
        offset += count
    return result


def _hf_name(name: str, offset: int) -> str:
    if ".layers." in name:
        _, _, index, *rest = name.split(".")
        name = f"model.layers.{int(index) + offset}.{'.'.join(rest)}"
    words = {
        "transformer.vocab_embedding": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "attention.dense": "self_attn.o_proj",
        "attention.q_layernorm": "self_attn.q_norm",
        "attention.k_layernorm": "self_attn.k_norm",
        "mlp.fc": "mlp.gate_proj",
        "mlp.gate.": "mlp.up_proj.",
        "mlp.proj": "mlp.down_proj",
        "post_layernorm": "post_attention_layernorm",
    }
    for ours, theirs in words.items():
        if ours in name:
            return name.replace(ours, theirs)
    return name


def _join(
    name: str, hf: str, parts: list[torch.Tensor], config: dict[str, Any], family: str
) -> dict[str, torch.Tensor]:
    if "attention.qkv" in name:
        return _split_qkv(hf, parts, config)
    if "layernorm" in name or "ln_f" in name or ("vocab_embedding" in name and not config["use_parallel_embedding"]):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return {hf: parts[0][: config["vocab_size"]] - (1.0 if family == "gemma" and "embed" not in hf else 0.0)}
    if "dense" in name or "mlp.proj" in name:
        return {hf: torch.cat(parts, dim=1)}
    whole = torch.cat(parts)
    if hf in ("lm_head.weight", "model.embed_tokens.weight"):
        assert not whole[config["vocab_size"] :].any()
        whole = whole[: config["vocab_size"]]
    return {hf: whole}


def _split_qkv(hf: str, parts: list[torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    tp, size, kv = len(parts), config["head_size"], config["num_key_value_heads"]
    q_rows, kv_rows = config["num_attention_heads"] * size // tp, max(1, kv // tp) * size
    pieces = [torch.split(part, [q_rows, kv_rows, kv_rows]) for part in parts]
    copies = max(1, tp // kv)
    result = {}
    for i, letter in enumerate("qkv"):
        kept = [piece[i] for piece in pieces][:: 1 if letter == "q" else copies]
        result[hf.replace("attention.qkv", f"self_attn.{letter}_proj")] = torch.cat(kept)
    return result


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("parallel", [False, True])
def test_ranks_concatenate_back_to_the_model(family: str, tp: int, pp: int, parallel: bool, tmp_path: Path) -> None:
    if family == "gemma" and pp > 1:
        pytest.skip("Gemma's converter knows no pipeline stages")
    config, tensors = tiny(family)
    write_trtllm(config, tensors, tmp_path, tp, pp, "float32", use_parallel_embedding=parallel)
    found = merge(tmp_path, family)
    if TINY[family][0].tied:
        torch.testing.assert_close(found.pop("lm_head.weight"), tensors["model.embed_tokens.weight"], rtol=0, atol=0)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        # 1e-6: Gemma's norms went through `+ 1` and back, every other value is moved, not computed
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 if family == "gemma" else 0)


@pytest.mark.parametrize(("tp", "rows"), [(1, 32 + 16 + 16), (2, 16 + 8 + 8), (4, 8 + 8 + 8)])
def test_fused_qkv_holds_q_then_k_then_v_and_doubles_scarce_kv_heads(tp: int, rows: int, tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    write_trtllm(config, tensors, tmp_path, tp, dtype="float32")
    for rank in range(tp):
        fused = load_file(tmp_path / f"rank{rank}.safetensors")["transformer.layers.0.attention.qkv.weight"]
        assert fused.shape == (rows, 32)
        head = rank * 2 // tp
        torch.testing.assert_close(
            fused[32 // tp : 32 // tp + 8],
            tensors["model.layers.0.self_attn.k_proj.weight"][head * 8 : head * 8 + 8],
            rtol=0,
            atol=0,
        )


def test_names_of_fc_and_gate_are_crossed(tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    write_trtllm(config, tensors, tmp_path, dtype="float32")
    rank = load_file(tmp_path / "rank0.safetensors")
    assert torch.equal(rank["transformer.layers.1.mlp.fc.weight"], tensors["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(rank["transformer.layers.1.mlp.gate.weight"], tensors["model.layers.1.mlp.up_proj.weight"])


def test_uneven_stages_give_the_first_one_the_extra_layer_and_count_from_zero(tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    write_trtllm(config, tensors, tmp_path, pp=2)
    first, last = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert {n.split(".")[2] for n in first if ".layers." in n} == {"0", "1", "2"}
    assert {n.split(".")[2] for n in last if ".layers." in n} == {"0", "1"}
    assert "transformer.vocab_embedding.weight" in first and "lm_head.weight" in last
    assert "transformer.ln_f.weight" not in first and "transformer.vocab_embedding.weight" not in last


def test_padding_and_gemma_conventions(tmp_path: Path) -> None:
    config, tensors = tiny("llama")
    write_trtllm(config, tensors, tmp_path / "llama", tp=2)
    with safe_open(tmp_path / "llama" / "rank1.safetensors", "pt") as file:
        assert file.get_slice("lm_head.weight").get_shape() == [17, 32]
        assert file.get_slice("transformer.vocab_embedding.weight").get_shape() == [33, 32]
        assert file.get_slice("lm_head.weight").get_dtype() == "F16"
    config, tensors = tiny("gemma")
    write_trtllm(config, tensors, tmp_path / "gemma", dtype="float32", lm_head=False)
    rank = load_file(tmp_path / "gemma" / "rank0.safetensors")
    assert torch.equal(rank["transformer.ln_f.weight"], tensors["model.norm.weight"] + 1)
    assert torch.equal(rank["transformer.vocab_embedding.weight"], tensors["model.embed_tokens.weight"])
    assert "lm_head.weight" not in rank


def test_config_says_what_the_ranks_are(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3")
    write_trtllm(config, tensors, tmp_path, tp=2, dtype="bfloat16")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == "Qwen3ForCausalLM" and written["dtype"] == "bfloat16"
    assert (written["head_size"], written["qwen_type"], written["qk_layernorm"]) == (16, "qwen3", False)
    assert written["mapping"]["world_size"] == written["mapping"]["tp_size"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "rank0.safetensors", "rank1.safetensors"]


@pytest.mark.parametrize(
    ("family", "more"),
    [("gemma", {"pp": 2}), ("llama", {"tp": 3}), ("llama", {"lm_head": False})],
)
def test_what_no_converter_writes_is_refused(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = tiny(family)
    with pytest.raises(ValueError, match=r"tp|tied"):
        write_trtllm(config, tensors, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
