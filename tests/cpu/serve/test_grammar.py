"""Texts of the bundled model held to grammars: always what was asked, whoever shares the batch."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import validate

from penstock import LLM, SamplingParams, bundled
from penstock.errors import PenstockError, SamplingError
from penstock.grammar import GuidedDecoding
from penstock.grammar.compiled import Compiled
from penstock.grammar.guide import Guide
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Gather, fresh_id, run_all
from penstock.serve.grammar_process import GrammarClient
from penstock.text import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["ship", "whale"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
}
REGEX = r"[A-Z][a-z]{2,5} [0-9]{1,3}"
PROMPT = "Call me Ishmael."


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_batch_size=8, max_num_tokens=64, max_seq_len=512) as opened:
        yield opened


def ask(seed: int = 0, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 200, **more})


def texts(llm: LLM, params: SamplingParams, prompt: str = PROMPT) -> list[str]:
    return [each.text for each in llm.generate(prompt, params)[0].outputs]


@pytest.fixture(params=[1, 2], ids=["one in flight", "two in flight"])
def either(llm: LLM, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """With two steps in flight the host learns a token only when the next step is launched, as on a GPU."""
    scheduler, before = llm._loop.executor.scheduler, llm._loop.executor.scheduler.limits
    scheduler.limits = type(before)(**{**vars_of(before), "max_steps_in_flight": request.param})
    yield llm
    scheduler.limits = before


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_json_fulfils_its_schema(either: LLM) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(4)]
    guided = GuidedDecoding(json=SCHEMA)
    params = [ask(seed, guided_decoding=guided, max_tokens=480) for seed in range(4)]
    for output in either.generate(prompts, params):
        done = output.outputs[0]
        assert done.finish_reason == "stop"
        validate(json.loads(done.text), SCHEMA)


@pytest.mark.parametrize(
    ("asked", "expression"),
    [
        ({"regex": REGEX}, REGEX),
        ({"choice": ["yes", "no", "perhaps not"]}, "yes|no|perhaps not"),
        ({"grammar": 'root ::= "<" [a-d]{2,4} ">"'}, "<[a-d]{2,4}>"),
    ],
)
def test_texts_are_what_was_asked(either: LLM, asked: dict[str, Any], expression: str) -> None:
    guided = GuidedDecoding(**asked)
    for temperature in (0.0, 1.5):
        output = either.generate(PROMPT, ask(3, guided_decoding=guided, n=3, temperature=temperature))[0]
        for done in output.outputs:
            assert done.finish_reason == "stop" and re.fullmatch(expression, done.text)
    found = {text for seed in range(4) for text in texts(either, ask(seed, guided_decoding=guided, n=2))}
    assert len(found) > 1, "each text has a guide and draws of its own"


def test_a_batch_gives_what_each_gets_alone(either: LLM) -> None:
    params = [
        ask(1, guided_decoding=GuidedDecoding(regex=REGEX)),
        ask(2, max_tokens=12),
        ask(3, guided_decoding=GuidedDecoding(grammar='root ::= "<" [a-d]{9} ">"'), logprobs=2),
        ask(4, max_tokens=12, repetition_penalty=1.3, logprobs=1),
        ask(5, guided_decoding=GuidedDecoding(choice=["yes", "no"]), n=2, repetition_penalty=1.2, logit_bias={50: 2.0}),
        SamplingParams(max_tokens=9, use_beam_search=True, beam_width=2),
        ask(6, max_tokens=12, logits_processors=[lambda tokens, logits: logits * 1.5]),
    ]
    prompts = [f"{PROMPT} The {number}" for number in range(len(params))]
    alone = [either.generate(prompt, each)[0].outputs for prompt, each in zip(prompts, params, strict=True)]
    together = [output.outputs for output in either.generate(prompts, params)]
    assert together == alone


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    """The first token's, and for every later one the text so far as the prompt."""
    done = llm.generate(PROMPT, ask(1, guided_decoding=GuidedDecoding(regex=REGEX), logprobs=3))[0].outputs[0]
    prompt = llm.generate(PROMPT, ask(max_tokens=1))[0].prompt_token_ids
    asked = [{"prompt_token_ids": [*prompt, *done.token_ids[:n]]} for n in range(len(done.token_ids))]
    plain = llm.generate(asked, ask(max_tokens=1, logprobs=3, temperature=0.0, logit_bias={}))
    assert done.logprobs is not None
    for token, own, other in zip(done.token_ids, done.logprobs, plain, strict=True):
        first = other.outputs[0].logprobs
        assert first is not None
        likeliest = sorted(first[0].values(), reverse=True)[:3]
        mine = sorted((value for each, value in own.items() if each in first[0]), reverse=True)[:3]
        assert mine == pytest.approx(likeliest, abs=1e-5)
        if token in first[0]:
            assert own[token] == pytest.approx(first[0][token], abs=1e-5)
    total = sum(own[token] for token, own in zip(done.token_ids, done.logprobs, strict=True))
    assert done.cumulative_logprob == pytest.approx(total)


def test_it_is_counted_and_streams(llm: LLM) -> None:
    async def gathered() -> list[str]:
        parts = llm.generate_async(PROMPT, ask(guided_decoding=GuidedDecoding(regex=REGEX)))
        return [part.outputs[0].text async for part in parts]

    before = llm.stats()["guided_steps"]
    parts = asyncio.run(gathered())
    assert re.fullmatch(REGEX, parts[-1]) and len(parts) > 2
    assert llm.stats()["guided_steps"] - before == len(parts)
    texts(llm, ask(max_tokens=3))
    assert llm.stats()["guided_steps"] - before == len(parts)
    assert texts(llm, ask(guided_decoding=GuidedDecoding(json_object=True), max_tokens=5))[0][0] == "{"


def test_stop_strings_and_limits_cut_it_short(llm: LLM) -> None:
    guided = GuidedDecoding(regex="a{2}b{40}")
    done = llm.generate(PROMPT, ask(guided_decoding=guided, stop="bb"))[0].outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == ("aa", "stop", "bb")
    done = llm.generate(PROMPT, ask(guided_decoding=guided, max_tokens=3))[0].outputs[0]
    assert done.finish_reason == "length" and re.fullmatch("a{2}b*", done.text)


def test_a_preempted_text_goes_on_in_its_grammar(either: LLM) -> None:
    """Thrown out after each few steps, as for want of blocks, while others run."""
    executor, guided = either._loop.executor, GuidedDecoding(regex="[A-Z]([a-z]{3} ){6}")
    prompts, params = [f"{PROMPT} {i}" for i in range(4)], [ask(i, guided_decoding=guided) for i in range(4)]
    whole = [output.outputs[0] for output in either.generate(prompts, params)]
    step, count = executor.step, 0

    def disturbed() -> bool:
        nonlocal count
        count += 1
        if count % 3 == 0:
            executor.scheduler._preempt()
        return step()

    executor.step = disturbed  # type: ignore[method-assign]
    try:
        again = either.generate(prompts, params)
    finally:
        executor.step = step  # type: ignore[method-assign]
    assert [output.outputs[0] for output in again] == whole
    assert sum(output.metrics.preemptions for output in again) > 2


def test_every_token_is_of_its_grammar_whatever_happens_beside_it(either: LLM) -> None:
    """Several texts of a prompt, preempted and aborted at random, next to free ones: read by matchers that are new."""
    executor, numbers = either._loop.executor, random.Random(0)
    forms: list[dict[str, Any]] = [{"json": SCHEMA}, {"regex": REGEX}, {"grammar": 'root ::= ("ab" | "c")+'}]
    asked = [*(GuidedDecoding(**form) for form in forms), None]
    each = [asked[i % 4] for i in range(24)]
    params = [ask(i, n=1 + i % 3, max_tokens=40, guided_decoding=guided) for i, guided in enumerate(each)]
    step, aborted = executor.step, set[str]()

    def disturbed() -> bool:
        if numbers.random() < 0.1:
            executor.scheduler._preempt()
        if numbers.random() < 0.03 and executor._orders:
            aborted.add(name := numbers.choice([*executor._orders]))
            executor.abort(name)
        return step()

    executor.step = disturbed  # type: ignore[method-assign]
    try:
        outputs = either.generate([f"{PROMPT} {i}" for i in range(24)], params)
    finally:
        executor.step = step  # type: ignore[method-assign]
    assert len(aborted) > 1 and sum(output.metrics.preemptions for output in outputs) > 5
    ends = 0
    for guided, output in zip(each, outputs, strict=True):
        for text in output.outputs if guided is not None else ():
            assert guided is not None
            matcher = executor._intake._grammars.guide(executor._intake._compiler.compile(guided))._matcher
            assert all(matcher.accept_token(token) for token in text.token_ids)
            assert matcher.is_terminated() == (text.finish_reason == "stop")
            ends += text.finish_reason == "stop"
    assert ends > 5


def test_a_grammar_that_fails_ends_its_request_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Guide.fill

    def failing(self: Guide, tokens: Any, ahead: Any, mask: Any, row: int) -> None:
        if len(tokens) == 3:
            raise RuntimeError("a defect of the library")
        fill(self, tokens, ahead, mask, row)

    good = texts(llm, ask(2, max_tokens=12))
    monkeypatch.setattr(Guide, "fill", failing)
    heard: list[Any] = []
    ids = llm.generate(PROMPT, ask(max_tokens=1))[0].prompt_token_ids
    guided = ask(guided_decoding=GuidedDecoding(regex=REGEX), n=2)
    llm._loop.submit(Submission(fresh_id(), ids, guided, heard.append))
    assert texts(llm, ask(2, max_tokens=12)) == good
    while not heard:
        texts(llm, ask(max_tokens=2))
    assert isinstance(heard[0], SamplingError) and "a defect of the library" in str(heard[0])
    assert not llm._loop.executor.busy


def test_bans_that_leave_nothing_end_the_request(llm: LLM) -> None:
    with pytest.raises(SamplingError, match="is not of the grammar: bad_words"):
        texts(llm, ask(guided_decoding=GuidedDecoding(regex="a{5}"), bad_words=["a", "aa", "aaa", "aaaa", "aaaaa"]))
    assert texts(llm, ask(max_tokens=2))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"use_beam_search": True, "temperature": 0.0, "seed": None}, "guided_decoding=.* no meaning with use_beam"),
        ({"min_tokens": 3}, "min_tokens=3 does not go with guided_decoding"),
        ({"ignore_eos": True}, "ignore_eos=True does not go with"),
    ],
)
def test_what_does_not_go_with_a_grammar(llm: LLM, more: dict[str, Any], why: str) -> None:
    with pytest.raises(SamplingError, match=why):
        ask(guided_decoding=GuidedDecoding(regex="a"), **more)
    with pytest.raises(SamplingError, match="does not go with guided_decoding"):
        llm._loop.submit(Submission(fresh_id(), (5,), ask(**more), print, grammar=Compiled(b"as compiled elsewhere")))


def test_what_the_client_compiled_holds_the_engines_text(llm: LLM) -> None:
    """As it comes over the wire: parameters without it, and the grammar beside them."""
    tokenizer = Tokenizer.from_dir(bundled.target())
    client = GrammarClient(tokenizer, llm.engine.vocab_size, llm.engine.tokens["eos"])

    async def compiled() -> list[Compiled | PenstockError]:
        asked = [GuidedDecoding(regex=REGEX), GuidedDecoding(regex="(?=a)b"), GuidedDecoding(choice=["x", "yz"])]
        return await asyncio.gather(*map(client.compile, asked), return_exceptions=True)  # type: ignore[arg-type]

    try:
        regex, wrong, choice = asyncio.run(compiled())
        assert isinstance(wrong, SamplingError) and asyncio.run(client.compile(GuidedDecoding(regex=REGEX))) is regex
    finally:
        client.close()
    gather, ids = Gather(2), tuple(tokenizer.encode(PROMPT))
    new = [Submission(fresh_id(), ids, ask(4), gather.put, grammar=each) for each in (regex, choice)]  # type: ignore[arg-type]
    one, two = (output.outputs[0].text for output in run_all(llm._loop, new, gather))
    assert re.fullmatch(REGEX, one) and two in ("x", "yz")
