"""TensorRT-LLM checkpoints, written by code that shares nothing with the reader, against the Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    PenstockError,
    UnsupportedArchitectureError,
    UnsupportedError,
)
from penstock.ir.dialect import built, verify
from penstock.models import build_forward, read_spec
from penstock.models.checkpoint import Checkpoint
from penstock.models.directory import ModelDirectory
from tests.cpu.models.harness import Pool, Request, load_tensors, run_step
from tests.cpu.models.twins import save_twin
from tests.facts.trtllm import write_trtllm

Edit = Callable[[dict[str, Any]], Any]


def write(case: str, tmp_path: Path, tp: int = 1, pp: int = 1, **more: Any) -> tuple[Path, Path]:
    """(Hugging Face's directory, NVIDIA's) of a tiny model, in float32."""
    hf, out = tmp_path / "hf", tmp_path / "trtllm"
    save_twin(case, hf)
    config = json.loads((hf / "config.json").read_text())
    write_trtllm(config, load_file(hf / "model.safetensors"), out, tp, pp, "float32", **more)
    return hf, out


def logits(directory: Path) -> torch.Tensor:
    """f32[40, V]: every position of one prompt, through spec, binding, headers and graph."""
    model = ModelDirectory.open(directory)
    binding = model.binding("f32")
    graph = verify(build_forward(model.spec, binding, "f32", 16), built())
    pool = Pool(graph, load_tensors(model.checkpoint(), binding))
    torch.manual_seed(2)
    request, rows = Request(torch.randint(0, 99, (40,)).tolist()), []
    for _ in request.tokens:
        rows.append(run_step(graph, pool, [(request, 1)])[0])
    return torch.stack(rows)


def assert_same(hf: Path, out: Path) -> None:
    theirs, ours = logits(hf), logits(out)
    assert ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max() <= 1e-5


# The vocabulary is 99, the layers 2 or 3, so that padding and uneven stages are there; 4 ranks share 2 or 1 KV heads.
DEALT = [
    ("llama", 1, 1), ("llama", 2, 1), ("llama", 4, 1), ("llama", 2, 2), ("llama-mqa", 4, 2), ("llama-mha-tied", 2, 1),
    ("llama-mha-tied", 4, 2), ("llama-head-dim", 2, 1), ("llama-llama3", 2, 1), ("llama-yarn", 1, 1),
    ("llama-linear", 1, 2), ("mistral-no-window", 1, 1), ("mistral-no-window", 4, 2), ("qwen2", 1, 1), ("qwen2", 2, 2),
    ("qwen2-tied-mqa", 4, 1), ("qwen3", 1, 1), ("qwen3", 4, 2), ("gemma", 1, 1), ("gemma-mqa", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("case", "tp", "pp"), DEALT)
def test_the_model_is_the_same(case: str, tp: int, pp: int, tmp_path: Path) -> None:
    assert_same(*write(case, tmp_path, tp, pp))


@pytest.mark.parametrize("case", ["llama", "llama-mha-tied", "qwen2"])
def test_a_table_that_is_dealt(case: str, tmp_path: Path) -> None:
    assert_same(*write(case, tmp_path, 4, 1, use_parallel_embedding=True))


def test_a_table_that_is_dealt_by_columns(tmp_path: Path) -> None:
    hf, out = write("llama", tmp_path, 2)
    for rank in range(2):
        _retensor(out, rank, lambda t, r=rank: t.update(_columns(t, r)))
    _reconfig(out, lambda c: c.update(use_parallel_embedding=True, embedding_sharding_dim=1))
    assert_same(hf, out)


def _columns(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    name = "transformer.vocab_embedding.weight"
    return {name: tensors[name].chunk(2, 1)[rank].contiguous()}


def test_gemma_of_two_ranks(tmp_path: Path) -> None:
    """NVIDIA's converter wants a vocabulary that divides: 98 of 99 rows."""
    hf, out = tmp_path / "hf", tmp_path / "trtllm"
    save_twin("gemma", hf)
    config = json.loads((hf / "config.json").read_text()) | {"vocab_size": 98}
    tensors = load_file(hf / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:98].contiguous()
    (hf / "config.json").write_text(json.dumps(config))
    save_file(tensors, hf / "model.safetensors")
    write_trtllm(config, tensors, out, 2, 1, "float32")
    assert load_file(out / "rank1.safetensors")["transformer.vocab_embedding.weight"].shape == (49, 48)
    model = ModelDirectory.open(out)
    table = load_tensors(model.checkpoint(), model.binding("f32"))
    assert torch.equal(
        torch.cat([table[f"rank{r}/transformer.vocab_embedding.weight"] for r in range(2)]),
        tensors["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("case", ["llama-mha-tied", "qwen2-tied-mqa", "gemma"])
def test_no_head_means_tied(case: str, tmp_path: Path) -> None:
    hf, out = write(case, tmp_path, 1, 1, lm_head=False)
    _reconfig(out, lambda c: c.pop("tie_word_embeddings", None))
    assert ModelDirectory.open(out).spec.tied_head
    assert_same(hf, out)


def test_old_spellings(tmp_path: Path) -> None:
    """A file of 2024: no tie_word_embeddings, few fields in mapping, MoE fields outside, ranks beside the mapping."""
    hf, out = write("llama", tmp_path, 2)

    def old(config: dict[str, Any]) -> None:
        for key in ("tie_word_embeddings", "moe", "runtime_defaults", "rotary_embedding_dim", "head_size"):
            del config[key]
        config |= {"kv_dtype": "float16", "moe_num_experts": 0, "moe_top_k": 0, "moe_tp_mode": 2, "tp_size": 2}
        config |= {"moe_normalization_mode": None, "share_embedding_table": False, "architecture": "LLaMAForCausalLM"}
        config["mapping"] = {"world_size": 2}
        config["quantization"] = {"use_weight_only": False, "weight_only_precision": "int8"}

    _reconfig(out, old)
    assert_same(hf, out)


def test_a_lost_window_is_attention_to_everything(tmp_path: Path) -> None:
    _, out = write("mistral-window", tmp_path)
    assert {layer.mixer.window for layer in ModelDirectory.open(out).spec.layers} == {0}


def test_norms_are_the_stored_factors(tmp_path: Path) -> None:
    hf, out = write("gemma", tmp_path)
    spec = ModelDirectory.open(out).spec
    assert {norm.offset for layer in spec.layers for norm in (layer.mixer_norm, layer.feedforward_norm)} == {0.0}
    assert spec.final_norm.offset == 0.0 != read_spec(json.loads((hf / "config.json").read_text())).final_norm.offset


REFUSED: list[tuple[Edit, type[PenstockError], str]] = [
    (lambda c: c.update(sparsity=2), ConfigError, "unknown key sparsity = 2"),
    (lambda c: c["mapping"].update(ep_size=2), ConfigError, "unknown key ep_size = 2"),
    (lambda c: c["mapping"].update(cp_size=2), ConfigError, "cp_size = 2"),
    (lambda c: c["mapping"].update(world_size=3), ConfigError, "world_size = 3"),
    (lambda c: c["quantization"].update(quant_algo="FP8"), UnsupportedError, "quant_algo = 'FP8'"),
    (lambda c: c["quantization"].update(kv_cache_quant_algo="INT8"), UnsupportedError, "kv_cache_quant_algo = 'INT8'"),
    (lambda c: c["quantization"].update(new_scale=1), ConfigError, "unknown key new_scale"),
    (lambda c: c["moe"].update(num_experts=8), ConfigError, "num_experts = 8"),
    (lambda c: c.update(residual_mlp=True), ConfigError, "residual_mlp = True"),
    (lambda c: c.update(embedding_multiplier=12.0), ConfigError, "embedding_multiplier = 12.0"),
    (lambda c: c.update(position_embedding_type="alibi"), ConfigError, "position_embedding_type = 'alibi'"),
    (lambda c: c.update(rotary_embedding_dim=4), ConfigError, "rotary_embedding_dim = 4"),
    (lambda c: c.update(architecture="FalconForCausalLM"), UnsupportedArchitectureError, "FalconForCausalLM"),
    (lambda c: c.update(rotary_scaling={"type": "magic", "factor": 2.0}), ConfigError, "magic"),
    (lambda c: c.update(dtype="int8"), ConfigError, "int8"),
    (lambda c: c.pop("hidden_act"), ConfigError, "hidden_act"),
]


@pytest.mark.parametrize(("edit", "error", "message"), REFUSED)
def test_refused_by_name(edit: Edit, error: type[PenstockError], message: str, tmp_path: Path) -> None:
    _, out = write("llama", tmp_path)
    _reconfig(out, edit)
    with pytest.raises(error, match=message):
        ModelDirectory.open(out)


def test_tensors_missing_left_over_or_misshapen(tmp_path: Path) -> None:
    _, out = write("llama", tmp_path, 2)
    good = load_file(out / "rank1.safetensors")
    name = "transformer.layers.1.mlp.fc.weight"
    for edit, message in (
        (lambda t: t.pop(name), f"lacks rank1/{name}"),
        (lambda t: t.update({name: t[name][:3].contiguous()}), f"rank1/{name} is F32.3, 48., expected"),
        (lambda t: t.update(extra=t[name].clone()), "holds rank1/extra"),
        # A norm that every rank repeats is not read from this one, and still has to be there in its shape.
        (lambda t: t.pop("transformer.ln_f.weight"), "lacks rank1/transformer.ln_f.weight"),
    ):
        tensors = dict(good)
        edit(tensors)
        save_file(tensors, out / "rank1.safetensors")
        with pytest.raises(CheckpointError, match=message):
            ModelDirectory.open(out).checkpoint()


def test_rank_files_missing_or_too_many(tmp_path: Path) -> None:
    _, out = write("llama", tmp_path, 2)
    (out / "rank1.safetensors").rename(out / "rank2.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks rank1\.safetensors of 2 ranks"):
        ModelDirectory.open(out).checkpoint()
    (out / "rank1.safetensors").write_bytes((out / "rank2.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"rank2\.safetensors, but config.json says 2 ranks"):
        ModelDirectory.open(out)


def test_slices_are_read_from_rank_files(tmp_path: Path) -> None:
    _, out = write("llama", tmp_path, 2)
    name = "transformer.layers.0.mlp.fc.weight"
    whole = load_file(out / "rank1.safetensors")[name]
    checkpoint = Checkpoint.open_ranks(out, 2)
    assert torch.equal(checkpoint.read(f"rank1/{name}"), whole)
    assert torch.equal(checkpoint.read_slice(f"rank1/{name}", 0, 3, 7), whole[3:7])


def test_a_config_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        ModelDirectory.open(tmp_path)


def _reconfig(out: Path, edit: Edit) -> None:
    config = json.loads((out / "config.json").read_text())
    edit(config)
    (out / "config.json").write_text(json.dumps(config))


def _retensor(out: Path, rank: int, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(out / f"rank{rank}.safetensors")
    edit(tensors)
    save_file(tensors, out / f"rank{rank}.safetensors")
