"""Penalties, biases, bans, log-probabilities and several texts of a prompt, through the whole runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from penstock import LLM, SamplingParams
from penstock.errors import SamplingError
from penstock.runtime.requests import RequestOutput
from penstock.runtime.sampling.translate import fold_seed, spellings

PROMPTS = ([5, 9, 5, 9, 7, 30, 41], [17] * 3, list(range(40, 110)))
NEW = 40


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    limits = {"max_batch_size": 8, "max_num_tokens": 24}  # so that prompts come in chunks, and scores in more of them
    with LLM(tiny_model, device="cpu", dtype="float32", cache_dir=tmp_path_factory.mktemp("cache"), **limits) as llm:
        yield llm


def greedy(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NEW, **more})


def run(llm: LLM, params: SamplingParams | list[SamplingParams], prompts: Any = PROMPTS) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": each} for each in prompts], params)


@torch.no_grad()
def generated(model: Any, prompt: list[int], **asked: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **asked)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


WORDS = ("God", "the", "earth.")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition_penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "reward": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "one": ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
    "min_tokens": (
        {"min_tokens": 30, "logit_bias": {1: 3.0}},
        {"min_new_tokens": 30, "sequence_bias": [[[1], 3.0]]},
    ),
    "bias": (
        {"logit_bias": {t: 1.5 for t in range(3, 60)}},
        {"sequence_bias": [[[t], 1.5] for t in range(3, 60)]},
    ),
    "all": (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_tokens": 12, "logit_bias": {8: 2.0, 1: 3.0}},
        {
            "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 12,
            "sequence_bias": [[[8], 2.0], [[1], 3.0]],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_penalties_and_bans_are_those_of_hugging_face(llm: LLM, model: Any, case: str) -> None:
    ours, theirs = CASES[case]
    outputs = run(llm, greedy(**ours))
    wanted = [generated(model, list(prompt), max_new_tokens=NEW, eos_token_id=1, **theirs) for prompt in PROMPTS]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    assert wanted != [generated(model, list(prompt), max_new_tokens=NEW, eos_token_id=1) for prompt in PROMPTS]


def test_bad_words_are_those_of_hugging_face(llm: LLM, model: Any) -> None:
    plain = run(llm, greedy())
    assert llm.tokenizer is not None
    written = tuple(llm.tokenizer.decode(output.outputs[0].token_ids[2:4]) for output in plain)
    banned = [list(word) for word in spellings(written, llm.tokenizer, 300)]
    assert any(len(word) > 1 for word in banned)
    outputs = run(llm, greedy(bad_words=written))
    wanted = [generated(model, list(p), max_new_tokens=NEW, eos_token_id=1, bad_words_ids=banned) for p in PROMPTS]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    assert wanted != [list(output.outputs[0].token_ids) for output in plain]


def test_presence_and_frequency_count_what_was_generated(llm: LLM) -> None:
    def penalise(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        for token in set(tokens):
            logits[token] -= 0.4 + 0.25 * tokens.count(token)
        return logits

    before = llm.stats()["processor_steps"]
    by_hand = run(llm, greedy(logits_processors=[penalise]))
    assert llm.stats()["processor_steps"] > before
    for _ in range(2):
        outputs = run(llm, greedy(presence_penalty=0.4, frequency_penalty=0.25))
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in by_hand]
    assert [o.outputs for o in outputs] != [o.outputs for o in run(llm, greedy())]


@torch.no_grad()
def _logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


def _check(got: dict[int, float], want: torch.Tensor, token: int, top: int) -> None:
    best = want.topk(top).indices.tolist() if top else []
    assert next(iter(got)) == token and set(got) == {token, *best}
    for key, value in got.items():
        assert value == pytest.approx(float(want[key]), abs=2e-4)


@pytest.mark.parametrize(
    "params", [greedy(), SamplingParams(temperature=0.9, seed=3, max_tokens=NEW, presence_penalty=1.0)]
)
def test_logprobs_are_the_models_own(llm: LLM, model: Any, params: SamplingParams) -> None:
    asked = SamplingParams(**{**vars(params), "logprobs": 4, "prompt_logprobs": 2, "ignore_eos": True})
    plain = SamplingParams(**{**vars(params), "ignore_eos": True})
    for output, same, prompt in zip(run(llm, asked), run(llm, plain), PROMPTS, strict=True):
        done = output.outputs[0]
        assert done.token_ids == same.outputs[0].token_ids and same.outputs[0].logprobs is None
        want = _logprobs(model, [*prompt, *done.token_ids])
        assert done.logprobs is not None and len(done.logprobs) == len(done.token_ids) == NEW
        for i, token in enumerate(done.token_ids):
            _check(dict(done.logprobs[i]), want[len(prompt) + i - 1], token, 4)
        total = sum(float(want[len(prompt) + i - 1, token]) for i, token in enumerate(done.token_ids))
        assert done.cumulative_logprob == pytest.approx(total, abs=1e-2)
        of_prompt = output.prompt_logprobs
        assert of_prompt is not None and len(of_prompt) == len(prompt) and of_prompt[0] is None
        for i in range(1, len(prompt)):
            _check(dict(of_prompt[i] or {}), want[i - 1], prompt[i], 2)
        assert output.metrics.reused_tokens == 0 and same.prompt_logprobs is None


def test_only_what_was_asked_for_is_given(llm: LLM) -> None:
    (output,) = run(llm, greedy(prompt_logprobs=1, max_tokens=3), PROMPTS[:1])
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is None


def test_a_bad_word_that_the_model_cannot_write_is_no_matter(llm: LLM) -> None:
    assert llm.tokenizer is not None
    assert spellings(("God",), llm.tokenizer, 300) and not spellings(("God",), llm.tokenizer, 3)


def test_the_chosen_ones_alone(llm: LLM) -> None:
    output = run(llm, greedy(logprobs=0, max_tokens=3), PROMPTS[:1])[0].outputs[0]
    assert output.logprobs is not None and [set(each) for each in output.logprobs] == [{t} for t in output.token_ids]


def test_several_texts_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=3)
    outputs = run(llm, params)
    assert [len(o.outputs) for o in outputs] == [3, 3, 3]
    assert [[c.token_ids for c in o.outputs] for o in outputs] == [
        [c.token_ids for c in o.outputs] for o in run(llm, params)
    ]
    for output in outputs:
        assert [c.index for c in output.outputs] == [0, 1, 2] and len({c.token_ids for c in output.outputs}) == 3
        assert output.finished and all(c.logprobs is None for c in output.outputs)
    alone = run(llm, SamplingParams(temperature=1.0, seed=5, max_tokens=12))
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in outputs]
    assert len({fold_seed(5, i) for i in range(100)}) == 100


def test_what_looks_back_sees_its_own_text_where_kv_was_found(llm: LLM) -> None:
    """Slots still hold the text of whoever was there before."""
    others, prompt = list(range(150, 290)), list(range(2, 102))
    params = greedy(repetition_penalty=1.5, no_repeat_ngram_size=2, n=3, max_tokens=10, ignore_eos=True)
    run(llm, greedy(max_tokens=100, ignore_eos=True), [others] * 8)
    (first,) = run(llm, params, [prompt])
    assert len({each.token_ids for each in first.outputs}) == 1 and first.metrics.reused_tokens == 2 * 64
    run(llm, greedy(max_tokens=100, ignore_eos=True), [others] * 8)
    (again,) = run(llm, params, [prompt])
    assert again.outputs == first.outputs and again.metrics.reused_tokens == 3 * 64


def test_the_best_of_several(llm: LLM) -> None:
    every = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=5, logprobs=0)
    best = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=2, best_of=5)
    for all_, two in zip(run(llm, every), run(llm, best), strict=True):
        ranked = sorted(all_.outputs, key=lambda each: -(each.cumulative_logprob or 0))
        assert [c.token_ids for c in two.outputs] == [c.token_ids for c in ranked[:2]]
        assert [c.index for c in two.outputs] == [0, 1] and two.outputs[0].logprobs is None
    with pytest.raises(SamplingError, match="n=2 texts make no stream"):
        llm.stream({"prompt_token_ids": [5]}, best)
    with pytest.raises(SamplingError, match="cannot be streamed"):
        llm.stream({"prompt_token_ids": [5]}, SamplingParams(best_of=2))


def test_what_could_never_be_had_is_refused(llm: LLM) -> None:
    for params, said in (
        (greedy(max_tokens=20, min_tokens=20), "min_tokens=20 behind a prompt of 240 tokens exceeds max_seq_len=256"),
        (SamplingParams(use_beam_search=True, n=16, stop_token_ids=tuple(range(2, 20))), "likeliest tokens"),
    ):
        with pytest.raises(SamplingError, match=said):
            run(llm, params, [list(range(2, 242))])


def test_whatever_a_processor_does_it_ends_its_request_alone(llm: LLM) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("nothing to say")

    def ends(error: BaseException) -> Any:
        def process(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
            raise error

        return process

    bad = [ends(SystemExit(1)), ends(KeyboardInterrupt()), ends(Mute()), lambda t, x: x.to("meta")]
    bad += [lambda t, x: x.to_sparse(), lambda t, x: x.resize_(5), lambda t, x: run(llm, greedy())]
    others = llm.stream({"prompt_token_ids": PROMPTS[2]}, greedy(max_tokens=100))
    for processor in bad:
        with pytest.raises(SamplingError, match="a logits processor of request"):
            run(llm, greedy(logits_processors=[processor]), PROMPTS[:1])
    assert "".join(others) == run(llm, greedy(max_tokens=100))[2].outputs[0].text


def test_a_processor_that_fails_ends_its_request_alone(llm: LLM) -> None:
    def broken(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) == 3:
            raise ValueError("no more")
        return logits

    stream = llm.stream({"prompt_token_ids": PROMPTS[2]}, greedy(max_tokens=100))
    for processor, said in ((broken, "no more"), (lambda tokens, logits: logits[1:], "give the logits back")):
        with pytest.raises(SamplingError, match=said):
            run(llm, greedy(logits_processors=[processor], n=2))
    assert "".join(stream) == run(llm, greedy(max_tokens=100))[2].outputs[0].text
    stats = llm.stats()
    assert stats["requests_running"] == stats["requests_waiting"] == stats["kv_cache_usage"] == 0


def test_a_processor_forces_a_token_and_neighbours_are_as_alone(llm: LLM) -> None:
    def force(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits.fill_(-torch.inf)[50 + len(tokens)] = 0.0
        return logits

    mixed = [greedy(logits_processors=[force], max_tokens=6), greedy(repetition_penalty=1.3), greedy(n=2)]
    together = run(llm, mixed)
    assert together[0].outputs[0].token_ids == (50, 51, 52, 53, 54, 55)
    alone = [run(llm, params, [prompt])[0] for params, prompt in zip(mixed, PROMPTS, strict=True)]
    assert [[c.token_ids for c in o.outputs] for o in together] == [[c.token_ids for c in o.outputs] for o in alone]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"logit_bias": {300: 1.0}}, "token 300, which is outside the vocabulary of 300"),
        ({"logit_bias": {t: 1.0 for t in range(300)}, "bad_words": ("z " * 300,)}, "room for 1008"),
    ],
)
def test_what_a_slot_cannot_hold_is_refused(llm: LLM, params: dict[str, Any], said: str) -> None:
    with pytest.raises(SamplingError, match=said):
        run(llm, greedy(**params))


def test_min_p_keeps_the_likeliest(llm: LLM) -> None:
    sure = SamplingParams(temperature=1.0, min_p=1.0, seed=1, max_tokens=NEW)
    assert [o.outputs[0].token_ids for o in run(llm, sure)] == [o.outputs[0].token_ids for o in run(llm, greedy())]
