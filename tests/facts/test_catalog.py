"""The facts of every family agree with transformers, with what publishers count, and with `penstock check`."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.errors import PenstockError
from penstock.models import read_spec
from tests.facts import catalog
from tests.facts.kv import Kept, kept
from tests.facts.pending import BUILT, PENDING, READ, REFUSED, STEMS, architecture
from tests.facts.shapes import Config
from tests.facts.tensors import PARAMETERS, published_config, tensor_names

NAMES = sorted(catalog.CATALOG)
# What transformers 5 calls otherwise than the files.
PREFIX = {"gpt2": "transformer.", "bloom": "transformer.", "bart": "model."}
RENAMED = {"gpt_neox": {"embed_out.weight": "lm_head.weight"}}
FUSED = ("mixtral", "dbrx", "qwen2_moe", "qwen3_moe", "qwen3_next", "gpt_oss", "deepseek_v2", "deepseek_v3")
REMOTE = ("RefinedWebModel", "grok-1", "qwen", "baichuan", "chatglm")  # code beside the weights, not in transformers
OF_THE_FILE = (
    "architectures", "auto_map", "torch_dtype", "transformers_version", "quantization_config", "_attn_implementation"
)  # fmt: skip


def test_every_architecture_is_built_or_pending() -> None:
    assert {architecture(stem) for stem in STEMS if stem not in BUILT} == PENDING
    assert set(REFUSED) <= set(STEMS)


def test_sources_name_every_config() -> None:
    text = (Path(__file__).parent / "SOURCES.md").read_text()
    assert [stem for stem in STEMS if f"`{stem}`" not in text and not stem.endswith(".transformers5")] == []


@pytest.mark.parametrize("name", NAMES)
def test_shapes_add_up_to_the_count_and_to_the_card(name: str) -> None:
    fact = catalog.CATALOG[name]
    assert catalog.counted(published_config(name)) == fact.parameters
    if number := re.fullmatch(r"(\d+)\.?(\d*)B", fact.card):
        published, unit = float(fact.card[:-1]) * 1e9, 10.0 ** (9 - len(number[2]))
        assert abs(fact.parameters - published) <= max(0.001 * published, unit / 2)


@pytest.mark.parametrize("name", [name for name in NAMES if catalog.CATALOG[name].stored])
def test_files_hold_what_the_hub_counts(name: str) -> None:
    assert sum(prod(shape) for shape in tensor_names(name).values()) == catalog.CATALOG[name].stored


def test_published_index_sizes_settle_what_else_the_files_hold() -> None:
    def bytes_of(name: str, special: dict[str, int], usual: int = 2) -> int:
        sizes = ((next((b for end, b in special.items() if n.endswith(end)), usual), s) for n, s in sizes_of(name))
        return sum(each * prod(shape) for each, shape in sizes)

    def sizes_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
        return list(tensor_names(name).items())

    assert bytes_of("gpt-neox-20b", {"attention.bias": 1}) == 41_293_685_880  # masks are booleans
    assert bytes_of("chatglm2-6b", {}) == 12_487_168_064  # one table of frequencies for all layers
    assert bytes_of("flan-t5-xl", {}, 4) == 11_925_413_888  # the table three times
    assert bytes_of("falcon-7b", {}) == 14_434_379_520  # the table twice
    assert bytes_of("Mixtral-8x7B-v0.1", {}) == 93_405_585_408


def test_deepseek_v3_is_in_three_formats_and_as_many_tensors() -> None:
    names = tensor_names("DeepSeek-V3")
    singles = [n for n in names if n.endswith(("_scale_inv", "e_score_correction_bias"))]
    scaled = [n for n in names if f"{n}_scale_inv" in names]
    count = {"F32": singles, "F8_E4M3": scaled, "BF16": names.keys() - {*singles, *scaled}}
    numbers = {form: sum(prod(names[n]) for n in held) for form, held in count.items()}
    assert numbers == {"F32": 41_555_600, "F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560}
    assert len(names) == 91_991


def test_grok_is_called_after_its_layers() -> None:
    weights = catalog.weights(published_config("grok-1"))
    assert sum(prod(shape) for name, shape in weights if ".layers." in name) // 10**9 == 314


def test_old_spellings_are_there() -> None:
    first, last = "gpt_neox.layers.0.attention", "transformer.layers.27.attention"
    neox = tensor_names("gpt-neox-20b")
    assert neox[f"{first}.bias"] == (1, 1, 2048, 2048) and neox[f"{first}.masked_bias"] == ()
    assert neox[f"{first}.rotary_emb.inv_freq"] == (12,)
    assert tensor_names("gpt2")["h.11.attn.bias"] == (1, 1, 1024, 1024)
    assert tensor_names("chatglm-6b")[f"{last}.rotary_emb.inv_freq"] == (32,)
    assert tensor_names("falcon-7b")["lm_head.weight"] == (65024, 4544)
    assert tensor_names("opt-125m")["model.decoder.embed_positions.weight"] == (2050, 768)
    assert tensor_names("opt-350m")["model.decoder.project_in.weight"] == (1024, 512)
    assert tensor_names("bart-large-cnn")["final_logits_bias"] == (1, 50264)
    assert tensor_names("gpt-oss-20b")["model.layers.23.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)


# Against transformers, a few layers of each


def shrunk(config: Config) -> Config:
    """The same model with four layers: they all have the names of the others."""
    keys = {"n_layer", "n_layers", "num_layers", "num_hidden_layers", "num_decoder_layers"}
    keys |= {"encoder_layers", "decoder_layers"}
    small = {**config, **{key: min(config[key], 4) for key in keys & config.keys()}}
    return {**small, **({"layer_types": config["layer_types"][:4]} if "layer_types" in config else {})}


def reference(config: Config) -> dict[str, tuple[int, ...]]:
    """(name, shape) of every parameter that transformers builds, and of the bias that DeepSeek-V3 keeps as a buffer."""
    transformers = pytest.importorskip("transformers")
    given = {key: value for key, value in config.items() if key not in OF_THE_FILE}
    if "attn_config" in given:  # transformers 5 wants a float there; the storywriter's file says 6
        given["attn_config"] = {k: float(v) if k == "clip_qkv" and v else v for k, v in given["attn_config"].items()}
    seq2seq = given["model_type"] in ("t5", "bart")
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(transformers.AutoConfig.for_model(given.pop("model_type"), **given))
    named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "e_score" in n)]
    return {name: tuple(value.shape) for name, value in named}


@pytest.mark.parametrize("name", [n for n in NAMES if published_config(n)["model_type"] not in (*FUSED, *REMOTE)])
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    config = shrunk(published_config(name))
    family = config["model_type"]
    prefix, renamed = PREFIX.get(family, ""), RENAMED.get(family, {})
    ours = {renamed.get(n, prefix + n.removeprefix(prefix)): s for n, s in catalog.weights(config)}
    if family == "t5":
        ours.pop("lm_head.weight", None)  # T5Config of transformers 5 says tied whatever the file says
    assert ours == reference(config)


@pytest.mark.parametrize("name", [n for n in NAMES if published_config(n)["model_type"] in FUSED])
def test_numbers_of_fused_experts_are_those_of_transformers(name: str) -> None:
    config = shrunk(published_config(name))
    assert catalog.counted(config) == sum(prod(shape) for shape in reference(config).values())


# What is kept of a context


KEPT = {
    "Llama-3.1-8B": Kept(131_072),
    "Mistral-7B-v0.1": Kept(0, 131_072, 4096),
    "falcon-7b": Kept(8_192),
    "bloom": Kept(4_014_080),
    "chatglm2-6b": Kept(28_672),
    "gemma-2-9b": Kept(172_032, 172_032, 4096),
    "gemma-3-27b-it.text": Kept(81_920, 425_984, 1024),
    "gpt-oss-120b": Kept(36_864, 36_864, 128),
    "DeepSeek-V3": Kept(70_272),  # the paper's 70.272 kB
    "bart-large-cnn": Kept(49_152, cross=49_152),
    "Mamba-Codestral-7B-v0.1": Kept(0, state=64 * (3 * (8192 + 2 * 8 * 128) + 8192 * 128)),
    "Qwen3-Next-80B-A3B-Instruct": Kept(24_576, state=36 * (3 * 8192 + 32 * 128 * 128)),
}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_what_is_kept(name: str) -> None:
    assert kept(published_config(name)) == KEPT[name]


# What Penstock says


@pytest.mark.parametrize("stem", READ)
def test_check_counts_the_parameters_and_the_kv(stem: str, tmp_path: Path) -> None:
    config, name = published_config(stem), stem.removesuffix(".transformers5")
    parameters, facts = PARAMETERS[name], kept(config)
    data = checked(config, tmp_path)
    assert data["model"]["parameters"] == pytest.approx(parameters, rel=1e-3)
    plan = data["memory"]
    assert plan["kv_per_token"] == facts.full + facts.windowed
    assert plan["weights"] >= 2 * parameters * 0.999
    assert plan["weights"] + plan["kv_per_request"] < plan["needed"] <= plan["at_limits"]


def checked(config: Config, directory: Path) -> dict[str, Any]:
    """`penstock check` of the config alone, in bfloat16 on a GPU with room for all of them."""
    from penstock.cli import check_report
    from penstock.cli.probe import target_device
    from penstock.compiler.options import BuildOptions

    (directory / "config.json").write_text(json.dumps(config))
    device = target_device("h200")
    return check_report.report(directory, BuildOptions("bfloat16", "random", device.kind), device, 2**40)


def test_refused_by_name() -> None:
    for stem in REFUSED.keys() & set(BUILT):
        with pytest.raises(PenstockError, match=REFUSED[stem]):
            read_spec(published_config(stem))
