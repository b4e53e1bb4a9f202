"""The bundled model: its files, its size, its promises, and its figures measured again by other code than made them.

The measuring here is Transformers' Llama with the adapters merged by hand; `results.json` came from tools/train.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from penstock import bundled

CONTEXT, STRIDE = 1024, 512
FOLDER = bundled.heldout().parent
VOICES = (*bundled.ADAPTERS, "jargon")
HF_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@cache
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    return found


@cache
def passages(voice: str) -> tuple[str, ...]:
    records = map(json.loads, bundled.heldout().read_text(encoding="utf-8").splitlines())
    return tuple(r["text"] for r in records if r["voice"] == voice)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(bundled.target() / "tokenizer.json"))


@cache
def model(name: str) -> LlamaForCausalLM:
    """`target`, `draft`, or the target with one adapter merged into its weights; stored bfloat16 values in float32."""
    folder = bundled.draft() if name == "draft" else bundled.target()
    loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if name in bundled.ADAPTERS:
        merge(loaded, bundled.adapter(name))
    loaded.train(False)
    return loaded


@torch.no_grad()
def merge(base: LlamaForCausalLM, folder: Path) -> None:
    """W += alpha / r * B A for every linear of a PEFT folder (Hu et al. 2021)."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    stored = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
    modules = {key.rpartition(".lora_")[0] for key in stored}
    assert len(modules) == 7 * base.config.num_hidden_layers
    for module in modules:
        a, b = (stored[f"{module}.lora_{side}.weight"] for side in "AB")
        base.get_submodule(module).weight += config["lora_alpha"] / config["r"] * b @ a


@torch.no_grad()
def windows(name: str, text: str) -> Iterator[torch.Tensor]:
    """Nats of the tokens after <|bos|>, each once, in windows of 1024 that step by 512."""
    tokens = torch.tensor(tokenizer().encode(text).ids)
    counted = 1
    for start in range(0, len(tokens), STRIDE):
        window = tokens[start : start + CONTEXT]
        logits = model(name)(window[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        yield losses[counted - start - 1 :].double()
        counted = start + len(window)
        if counted == len(tokens):
            return


def score(name: str, texts: tuple[str, ...]) -> tuple[float, float]:
    """(bits per byte, perplexity per token) over whole passages."""
    nats = torch.cat([losses for text in texts for losses in windows(name, text)])
    num_bytes = sum(len(text.encode()) for text in texts)
    return nats.sum().item() / math.log(2) / num_bytes, math.exp(nats.mean().item())


def test_every_file_is_there_and_all_fit_into_16_megabytes() -> None:
    expected = {f"{name}/{file}" for name in ("target", "draft") for file in HF_FILES}
    expected |= {
        f"adapters/{name}/{file}"
        for name in bundled.ADAPTERS
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    expected |= {"heldout.jsonl", "results.json", "README.md", "LICENSES.md", "__init__.py"}
    files = {f for f in FOLDER.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert {f.relative_to(FOLDER).as_posix() for f in files} == expected
    assert sum(f.stat().st_size for f in files) <= 16e6


def test_the_draft_is_at_most_a_quarter_of_the_target_and_shares_its_tokenizer() -> None:
    sizes = {name: sum(p.numel() for p in model(name).parameters()) for name in ("target", "draft")}
    assert sizes == results()["parameters"]
    assert sizes["draft"] <= sizes["target"] / 4
    assert (bundled.draft() / "tokenizer.json").read_bytes() == (bundled.target() / "tokenizer.json").read_bytes()
    assert tokenizer().get_vocab_size() == model("target").config.vocab_size


def test_the_recorded_figures_meet_the_targets() -> None:
    recorded, table = results(), results()["adapter_perplexity"]
    assert recorded["target"]["bits_per_byte"] <= 1.6
    assert recorded["draft"]["bits_per_byte"] <= 1.9
    for name in bundled.ADAPTERS:
        assert table[name][name] <= 0.9 * table["base"][name]
        assert all(table[name][name] < table[other][name] for other in bundled.ADAPTERS if other != name)
    assert all(recorded["checks"].values())


def test_the_heldout_text_is_the_one_that_was_measured() -> None:
    measured = {voice: sum(len(text.encode()) for text in passages(voice)) for voice in VOICES}
    assert measured == {voice: report["bytes"] for voice, report in results()["target"]["voices"].items()}
    assert sum(measured.values()) == results()["target"]["bytes"] >= 200_000


@pytest.mark.parametrize("name", ["target", "draft"])
def test_bits_per_byte_on_all_of_the_jargon_is_as_recorded(name: str) -> None:
    """15 kB, a whole voice: the very number, apart from float32's rounding on another device."""
    bits, perplexity = score(name, passages("jargon"))
    recorded = results()[name]["voices"]["jargon"]
    assert bits == pytest.approx(recorded["bits_per_byte"], abs=1e-4)
    assert perplexity == pytest.approx(recorded["perplexity"], rel=1e-4)


@pytest.mark.parametrize("name", bundled.ADAPTERS)
def test_an_adapters_perplexity_on_the_jargon_is_as_recorded(name: str) -> None:
    _, perplexity = score(name, passages("jargon"))
    assert perplexity == pytest.approx(results()["adapter_perplexity"][name]["jargon"], rel=1e-4)


@pytest.mark.parametrize("voice", bundled.ADAPTERS)
def test_each_adapter_is_the_best_in_its_own_voice(voice: str) -> None:
    """On two passages; a tenth is promised on the whole text, of which this is a sample, so half of it is asked."""
    sample = passages(voice)[:2]
    perplexity = {name: score(name, sample)[1] for name in ("target", *bundled.ADAPTERS)}
    assert min(perplexity, key=lambda name: perplexity[name]) == voice
    assert perplexity[voice] <= 0.95 * perplexity["target"]


def test_licences_name_every_text() -> None:
    text = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    named = {"scripture": "King James", "dictionary": "WordNet", "manual": "Python", "jargon": "Jargon File"}
    assert set(named) == set(VOICES) <= set(rows)
    for voice, title in named.items():
        assert title in rows[voice]
        assert f"\n## The {title}" in text or f"\n## {title}" in text
