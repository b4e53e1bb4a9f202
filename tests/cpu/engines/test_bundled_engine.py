"""The bundled model through `LLM()`: its text and its bits per byte are those that Transformers finds in its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from penstock import LLM, SamplingParams, bundled
from penstock.engine import store
from penstock.runtime.step import CpuBackend
from penstock.text.tokenizer import Tokenizer
from tests.cpu.engines.driven import generated
from tests.forced import Forced

NEW = 48
PROMPTS = ("In the beginning", "A tuple is an immutable sequence", "Define mountain.")
VOICES = ("scripture", "dictionary", "manual", "jargon")
PASSAGES, TOKENS = 4, 112  # of each voice, and of each passage: 6 kB together


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(device="cpu", dtype="float32", cache_dir=tmp_path_factory.mktemp("cache"), max_seq_len=256) as model:
        yield model


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """The stored bfloat16 values in float32, as our engine computes with them."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(bundled.target(), dtype=torch.float32)
    model.train(False)
    return model


def test_greedy_text_is_transformers(llm: LLM, reference: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.target())
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert list(output.prompt_token_ids) == tokenizer(prompt).input_ids
        theirs = generated(reference, list(output.prompt_token_ids), NEW).tokens
        assert list(output.outputs[0].token_ids) == theirs
        assert output.outputs[0].text == tokenizer.decode(theirs, skip_special_tokens=True)


def heldout() -> list[list[int]]:
    """The beginnings of passages of every voice, from <|bos|> on."""
    records = [json.loads(line) for line in bundled.heldout().read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer.from_dir(bundled.target())
    texts = [r["text"] for v in VOICES for r in [r for r in records if r["voice"] == v][:PASSAGES]]
    return [list(tokenizer.encode(text))[:TOKENS] for text in texts]


def bits(logits: torch.Tensor, tokens: list[int]) -> float:
    """Of tokens[1:], each behind those before it; logits: f32[n,V] or longer, from position 0 on."""
    losses = torch.nn.functional.cross_entropy(logits[: len(tokens) - 1], torch.tensor(tokens[1:]), reduction="none")
    return losses.double().sum().item() / math.log(2)


def test_bits_per_byte_are_transformers(llm: LLM, reference: LlamaForCausalLM) -> None:
    """Every token decoded in steps of sixteen rows, its KV read back from blocks."""
    sequences = heldout()
    tokenizer = Tokenizer.from_dir(bundled.target())
    num_bytes = sum(len(tokenizer.decode(tokens[1:]).encode()) for tokens in sequences)
    assert num_bytes >= 5500
    engine, directory = store.load(llm.engine_dir), Path(llm.engine_dir)
    forced = Forced(engine, CpuBackend(engine, directory)).run(sequences, [1] * len(sequences))
    ours = sum(bits(rows, tokens) for rows, tokens in zip(forced, sequences, strict=True)) / num_bytes
    with torch.no_grad():
        theirs = sum(bits(reference(torch.tensor([s])).logits[0], s) for s in sequences) / num_bytes
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert 1.0 < ours < 2.0, "a trained model's figure: beginnings are harder than whole passages"


def test_the_readme_states_the_recorded_figures() -> None:
    """What the README says of the bundled model stands in results.json."""
    recorded = json.loads((bundled.heldout().parent / "results.json").read_text(encoding="utf-8"))
    readme = " ".join((Path(__file__).resolve().parents[3] / "README.md").read_text(encoding="utf-8").split())
    target, draft, parameters = recorded["target"], recorded["draft"], recorded["parameters"]
    assert f"{parameters['target']:,} parameters, {target['bits_per_byte']:.3f} bits per byte" in readme
    assert f"on {target['bytes']:,} bytes" in readme
    assert f"its draft has {parameters['draft']:,} and {draft['bits_per_byte']:.3f}" in readme
    shares = recorded["settings"]["share"]
    assert sorted(shares.values())[:3] == [0.35] * 3 and "35 % of three of its four voices" in readme
