"""Beam search against Hugging Face's own, which drives the same tiny random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.runtime.schedule.beams import BeamRules, BeamSearch, Hypothesis

VOCAB, NEW = 40, 9
PROMPTS = ((5, 6, 7), (30, 31, 32, 33, 8))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def theirs(model: Any, prompt: tuple[int, ...], rules: BeamRules, ends: list[int], best: int) -> list[Hypothesis]:
    """What generate says; for width 1, where it would be greedy, its beam search itself."""
    more = {"custom_generate": beam_search} if rules.width == 1 else {}
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=rules.width, do_sample=False,
        max_new_tokens=NEW, num_return_sequences=best, length_penalty=rules.length_penalty, pad_token_id=VOCAB - 1,
        early_stopping=rules.early_stopping, eos_token_id=ends or None, return_dict_in_generate=True,
        output_scores=True, **more,
    )  # fmt: skip
    texts = []
    for row, indices, score in zip(out.sequences, out.beam_indices, out.sequences_scores, strict=True):
        length = int((indices >= 0).sum())
        tokens = tuple(row[len(prompt) : len(prompt) + length].tolist())
        texts.append(Hypothesis(tokens, float(score) * length**rules.length_penalty, float(score), tokens[-1] in ends))
    return texts


def beam_search(model: Any, *args: Any, **more: Any) -> Any:
    return model._beam_search(*args, **more)


def ours(model: Any, prompt: tuple[int, ...], rules: BeamRules, ends: list[int]) -> BeamSearch:
    search = BeamSearch(rules, NEW, frozenset(ends))
    while not search.done:
        rows = torch.tensor([[*prompt, *tokens] for tokens, _ in search.live])
        with torch.no_grad():
            logprobs = model(rows).logits[:, -1].float().log_softmax(-1)
        top = logprobs.topk(search.num_candidates)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        search.advance([list(zip(tokens, values, strict=True)) for tokens, values in pairs])
    return search


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_the_same_texts_and_scores(model: Any, width: int, penalty: float, early: Any) -> None:
    rules, stopped, short = BeamRules(width, penalty, early), 0, 0
    for prompt in PROMPTS:
        for ends in ([], [3], [3, 17], [1, 3, 9, 17, 21, 25, 30]):
            search = ours(model, prompt, rules, ends)
            expected = theirs(model, prompt, rules, ends, width)
            assert [each.tokens for each in search.finished] == [each.tokens for each in expected]
            assert [each.stopped for each in search.finished] == [each.stopped for each in expected]
            for mine, other in zip(search.finished, expected, strict=True):
                assert mine.score == pytest.approx(other.score, rel=1e-5, abs=1e-5)
                assert mine.total == pytest.approx(other.total, rel=1e-4, abs=1e-4)
            stopped += sum(each.stopped for each in search.finished)
            short += search.length + 1 < NEW
    if width > 1:
        assert stopped and (short or early is not True), "ends were met, and the search was over before its limit"


def test_the_n_best_are_the_first_of_all(model: Any) -> None:
    rules = BeamRules(4, 1.0, False)
    search = ours(model, PROMPTS[0], rules, [3, 17])
    for best in (1, 2, 3):
        expected = theirs(model, PROMPTS[0], rules, [3, 17], best)
        assert [each.tokens for each in search.finished[:best]] == [each.tokens for each in expected]


def test_too_few_candidates_are_our_bug() -> None:
    search = BeamSearch(BeamRules(3), 5)
    with pytest.raises(AssertionError, match="1 of 3 beams live on"):
        search.advance([[(1, -0.5)]])
