"""Really published configs and tensor lists: every key is understood, every tensor is read, nothing is left over."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import CheckpointError
from penstock.ir.dialect import built, verify
from penstock.models import build_forward, declared, family_of, ignored_tensors, read_spec, weights
from penstock.models.checkpoint import Checkpoint, TensorInfo
from penstock.spec import DynamicNtk, Linear, Llama3, ModelSpec, Yarn
from tests.facts.pending import READ as STEMS
from tests.facts.tensors import PARAMETERS, published_config, tensor_names

UNCOUNTED = {"final_logits_bias"}  # weights that are no parameters to their publishers


def published(stem: str) -> tuple[dict[str, Any], ModelSpec]:
    config = published_config(stem)
    return config, read_spec(config)


def checkpoint_of(stem: str) -> Checkpoint:
    shapes = tensor_names(stem.removesuffix(".transformers5"))
    kinds = {name: "U8" if name.endswith(PACKED) else "BF16" for name in shapes}
    return Checkpoint(Path(stem), {n: TensorInfo(s, kinds[n], 0, Path()) for n, s in shapes.items()})


PACKED = ("_blocks", "_scales")  # of gpt-oss: bytes of two numbers, and the scales of 32


def numbers(name: str, shape: tuple[Any, ...]) -> int:
    return 0 if name.endswith("_scales") else prod(shape) * (2 if name.endswith("_blocks") else 1)


@pytest.mark.parametrize("stem", STEMS)
def test_config_and_tensor_list_agree(stem: str) -> None:
    config, spec = published(stem)
    binding = weights(spec, config, "bf16")
    checkpoint_of(stem).renamed(family_of(config).renamed).check(binding, ignored_tensors(spec, config))
    read = {name: type for name, type in declared(binding).items() if name not in UNCOUNTED}
    count = sum(numbers(name, type.shape) for name, type in read.items())
    assert count == PARAMETERS[stem.removesuffix(".transformers5")]
    verify(build_forward(spec, binding, "bf16", 64), built())


def test_deepseek_v3_in_16_bits_is_read_but_for_the_layer_that_predicts_further() -> None:
    config = {k: v for k, v in published_config("DeepSeek-V3").items() if k != "quantization_config"}
    names = {n: s for n, s in tensor_names("DeepSeek-V3").items() if not n.endswith("_scale_inv")}
    checkpoint = Checkpoint(Path("V3"), {n: TensorInfo(s, "BF16", 2 * prod(s), Path()) for n, s in names.items()})
    spec = read_spec(config)
    binding, ignored = weights(spec, config, "bf16"), ignored_tensors(spec, config)
    checkpoint.check(binding, ignored)
    assert {n.split(".")[2] for n in names.keys() - declared(binding).keys()} == {"61"}
    further = replace(
        checkpoint, tensors={**checkpoint.tensors, "model.layers.62.x": TensorInfo((1,), "BF16", 2, Path())}
    )
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.62\.x"):
        further.check(binding, ignored)


@pytest.mark.parametrize("stem", STEMS)
def test_spec_survives_json(stem: str) -> None:
    _, spec = published(stem)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("stem", [s for s in STEMS if s.endswith(".transformers5")])
def test_both_spellings_mean_the_same(stem: str) -> None:
    assert published(stem)[1] == published(stem.removesuffix(".transformers5"))[1]


def test_facts_that_are_easily_lost() -> None:
    specs = {stem: published(stem)[1] for stem in STEMS}
    scaled = ("med42-70b-dynamic", "vicuna-7b-v1.5-16k", "Yarn-Llama-2-7b-128k", "Llama-3.2-1B")
    scaling = {stem: specs[stem].layers[0].mixer.rope.scaling for stem in scaled}
    assert scaling["med42-70b-dynamic"] == DynamicNtk(2.0, 2048) and specs["med42-70b-dynamic"].max_position == 4096
    assert scaling["vicuna-7b-v1.5-16k"] == Linear(4.0) and specs["vicuna-7b-v1.5-16k"].max_position == 16384
    assert scaling["Yarn-Llama-2-7b-128k"] == Yarn(32.0, 4096)
    assert scaling["Llama-3.2-1B"] == Llama3(32.0, 1.0, 4.0, 8192)
    assert specs["Mistral-7B-v0.1"].layers[31].mixer.window == 4096
    assert {layer.mixer.window for layer in specs["Qwen2-7B"].layers} == {0}  # a window is stated, and off
    assert specs["decapoda-llama-7b"].max_position == 2048
    assert specs["gemma-2b"].tied_head and specs["gemma-2b"].embedding_scale == 2048**0.5
    assert {specs[s].layers[0].feedforward.act for s in ("gemma-2b", "codegemma-2b")} == {"gelu_tanh"}


def test_only_the_excused_tensors_are_skipped() -> None:
    def skipped(stem: str) -> list[str]:
        config, spec = published(stem)
        return [n for n in tensor_names(stem) for p in ignored_tensors(spec, config) if re.fullmatch(p, n)]

    assert skipped("Qwen3-0.6B") == ["lm_head.weight"]  # tied, yet stored
    assert len(skipped("Llama-2-7b-hf")) == 32 and "lm_head.weight" not in skipped("Llama-2-7b-hf")
