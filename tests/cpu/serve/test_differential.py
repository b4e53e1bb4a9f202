"""Random sampling parameters by HTTP and by the library: the same texts, ends, log-probabilities and counts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.runtime.requests import CompletionOutput, RequestOutput
from penstock.text.spelling import Spelling
from tests.cpu.serve.asking import answer_of, streamed
from tests.cpu.serve.real import RealEngine
from tests.long import results

PROMPTS = ("Once upon a time", "The sea was", [17, 400, 23, 900], "He said: \u201c\U0001f600")
STOPS = (["the"], [" a", "\n"], ["."], ["e", "zzz"], [" and then"])


def drawn(numbers: random.Random) -> dict[str, Any]:
    """Fields of a request that SamplingParams has by the same name."""

    def maybe(name: str, value: Any, share: float = 0.3) -> dict[str, Any]:
        return {name: value} if numbers.random() < share else {}

    n = numbers.choice((1, 1, 1, 2, 3))
    greedy = numbers.random() < 0.3
    found: dict[str, Any] = {"seed": numbers.randrange(2**31), "n": n, "max_tokens": numbers.choice((1, 5, 24, 40))}
    found |= {"temperature": 0.0} if greedy else maybe("temperature", numbers.choice((0.5, 1.0, 1.7)), 0.7)
    found |= maybe("top_k", numbers.choice((1, 20, 200))) | maybe("top_p", numbers.choice((0.3, 0.9)))
    found |= maybe("min_p", 0.05, 0.1) | maybe("repetition_penalty", 1.3, 0.2) | maybe("presence_penalty", 0.7, 0.2)
    found |= maybe("frequency_penalty", -0.5, 0.2) | maybe("no_repeat_ngram_size", 3, 0.1)
    found |= maybe("stop", numbers.choice(STOPS), 0.4) | maybe("include_stop_str_in_output", True, 0.2)
    found |= maybe("stop_token_ids", [numbers.randrange(4096) for _ in range(400)], 0.2)
    found |= maybe("min_tokens", min(found["max_tokens"], numbers.choice((1, 4, 12))), 0.3)
    found |= maybe("ignore_eos", True, 0.2) | maybe("skip_special_tokens", False, 0.2)
    found |= maybe("bad_words", ["the", " was"], 0.1) | maybe("logprobs", numbers.choice((0, 1, 5)), 0.4)
    return found | (maybe("best_of", n + 2, 0.2) if not greedy else {})


def told(output: CompletionOutput, spelling: Spelling) -> list[Any]:
    """What a choice has to say of it."""
    scores = None
    if output.logprobs is not None:
        rows = [*zip(output.token_ids, output.logprobs, strict=True)]
        named = [sorted((spelling.of(token)[0], value) for token, value in row.items()) for _, row in rows]
        scores = [[spelling.of(token)[0] for token, _ in rows], [row[token] for token, row in rows], named]
    return [output.index, output.text, output.finish_reason, output.stop_reason, scores]


def said(choice: dict[str, Any]) -> list[Any]:
    scores = choice["logprobs"] and [choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")]
    scores = scores and [*scores[:2], [sorted(row.items()) for row in scores[2]]]
    return [choice["index"], choice["text"], choice["finish_reason"], choice["stop_reason"], scores]


def joined(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices that a stream brings, whole."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (each for event in events for each in event["choices"]):
        one = found.setdefault(choice["index"], choice | {"text": "", "logprobs": None})
        one["text"] += choice["text"]
        one |= {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
        if choice["logprobs"]:
            before = one["logprobs"] or {name: [] for name in choice["logprobs"]}
            one["logprobs"] = {name: before[name] + values for name, values in choice["logprobs"].items()}
    return [found[index] for index in sorted(found)]


def check(engine: RealEngine, llm: LLM, seed: int) -> None:
    numbers = random.Random(seed)
    prompt, asked = numbers.choice(PROMPTS), drawn(numbers)
    given: Any = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    expected: RequestOutput = llm.generate(given, SamplingParams(**asked))[0]
    assert llm.tokenizer is not None
    spelling = Spelling(llm.tokenizer)
    want = [told(each, spelling) for each in expected.outputs]
    if numbers.random() < 0.5 and "best_of" not in asked:
        events = streamed(engine, "completions", prompt=prompt, stream_options={"include_usage": True}, **asked)
        choices, usage = joined(events), events[-1]["usage"]
    else:
        found = answer_of(engine, "completions", prompt=prompt, **asked)
        choices, usage = found["choices"], found["usage"]
    assert [said(each) for each in choices] == want, (seed, prompt, asked)
    if "best_of" not in asked:
        assert usage["completion_tokens"] == sum(len(each.token_ids) for each in expected.outputs), (seed, asked)
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)


def test_random_parameters_give_what_the_library_gives(engine: RealEngine, llm: LLM) -> None:
    for seed in range(12):
        check(engine, llm, seed)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_many_do(engine: RealEngine, llm: LLM) -> None:
    for seed in range(1000, 1600):
        check(engine, llm, seed)
    results.write("serve_differential", requests=600)
