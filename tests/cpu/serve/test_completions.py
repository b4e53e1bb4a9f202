"""POST /v1/completions over the bundled model: its texts are those of `LLM.generate`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.serve.errors import too_late
from penstock.serve.link import EngineDied, EngineUnready
from penstock.serve.schema.completions import Completion
from penstock.serve.wire import Part, Submit
from tests.cpu.serve.asking import Ask, answer_of, app_on, ask_once, asking, events_of, streamed, told
from tests.cpu.serve.doubles import client_of
from tests.cpu.serve.real import Noted, RealEngine
from tests.cpu.serve.test_texts import Script

PROMPT = "In the beginning"
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5, "max_tokens": 24, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    {"temperature": 0.0, "max_tokens": 60, "stop": ["line of", "."]},
    {"temperature": 0.0, "max_tokens": 60, "stop": "line", "include_stop_str_in_output": True, "min_tokens": 6},
    {"temperature": 0.7, "seed": 1, "n": 3, "max_tokens": 12},
    {"temperature": 1.0, "seed": 2, "n": 2, "best_of": 4, "max_tokens": 8},
    {"use_beam_search": True, "n": 2, "beam_width": 3, "max_tokens": 8, "length_penalty": 0.5},
    {"temperature": 0.0, "max_tokens": 20, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5,
     "no_repeat_ngram_size": 3, "bad_words": ["line"]},
    {"temperature": 0.0, "max_tokens": 12, "logit_bias": {"300": 100.0}, "ignore_eos": True, "stop_token_ids": [7]},
    {"temperature": 1.2, "seed": 7, "max_tokens": 30, "skip_special_tokens": False},
]  # fmt: skip


def offline(llm: LLM, prompt: Any, **asked: Any) -> Any:
    bias = asked.pop("logit_bias", None)
    params = SamplingParams(**asked, logit_bias=bias and {int(k): v for k, v in bias.items()})
    return llm.generate(prompt, params)[0]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "-".join(asked))
def test_texts_are_those_of_the_library(engine: RealEngine, llm: LLM, asked: dict[str, Any]) -> None:
    expected = offline(llm, PROMPT, **asked)
    found = answer_of(engine, "completions", prompt=PROMPT, **asked)
    Completion.model_validate(found)
    got = [(c["index"], c["text"], c["finish_reason"], c["stop_reason"]) for c in found["choices"]]
    assert got == [(i, each.text, each.finish_reason, each.stop_reason) for i, each in enumerate(expected.outputs)]
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if "best_of" not in asked and "stop" not in asked:
        assert usage["completion_tokens"] == sum(len(each.token_ids) for each in expected.outputs)


@pytest.mark.parametrize("asked", [each for each in ASKED if not {"best_of", "use_beam_search"} & each.keys()],
                         ids=lambda asked: "-".join(asked))  # fmt: skip
def test_a_stream_joined_is_the_whole_answer(engine: RealEngine, asked: dict[str, Any]) -> None:
    whole = answer_of(engine, "completions", prompt=PROMPT, **asked)
    events = streamed(engine, "completions", prompt=PROMPT, stream_options={"include_usage": True}, **asked)
    *chunks, last = events
    for event in events:
        Completion.model_validate(event)
        assert {k: event[k] for k in ("id", "object", "created", "model")} == {k: last[k] for k in
            ("id", "object", "created", "model")}  # fmt: skip
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1]["stop_reason"] == choice["stop_reason"]


def test_a_beam_search_streams_whole_texts(engine: RealEngine) -> None:
    asked: dict[str, Any] = {"use_beam_search": True, "n": 2, "max_tokens": 6}
    whole = answer_of(engine, "completions", prompt=PROMPT, **asked)
    events = streamed(engine, "completions", prompt=PROMPT, **asked)
    assert [e["choices"][0]["text"] for e in events] == [c["text"] for c in whole["choices"]]


def test_prompts_come_as_text_ids_or_batches_of_either(engine: RealEngine, llm: LLM) -> None:
    assert llm.tokenizer is not None
    prompts = [PROMPT, "The lion", "int main("]
    ids = [llm.tokenizer.encode(each) for each in prompts]

    async def work(ask: Ask) -> list[Any]:
        forms = [*prompts, prompts, ids, ids[0]]
        return [(await ask("completions", prompt=each, temperature=0, max_tokens=6)).json() for each in forms]

    *alone, texts, tokens, one = asking(engine, work)
    said = [each["choices"][0]["text"] for each in alone]
    assert [c["text"] for c in texts["choices"]] == [c["text"] for c in tokens["choices"]] == said
    assert [c["index"] for c in texts["choices"]] == [0, 1, 2]
    assert one["choices"][0]["text"] == said[0]
    assert tokens["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_choices_of_a_batch_are_numbered_by_prompt_streamed_too(engine: RealEngine) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "The lion"], "n": 2, "seed": 3, "max_tokens": 5}
    whole = {c["index"]: c["text"] for c in answer_of(engine, "completions", **asked)["choices"]}
    parts = dict.fromkeys(range(4), "")
    for event in streamed(engine, "completions", **asked):
        parts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert parts == whole and [*whole] == [0, 1, 2, 3]


def test_logprobs_are_the_rows_of_the_library(engine: RealEngine, llm: LLM) -> None:
    expected = offline(llm, PROMPT, temperature=0.0, max_tokens=8, logprobs=2).outputs[0]
    choice = answer_of(engine, "completions", prompt=PROMPT, temperature=0.0, max_tokens=8, logprobs=2)["choices"][0]
    rows = choice["logprobs"]
    assert rows["token_logprobs"] == [s[t] for t, s in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert "".join(rows["tokens"]) == choice["text"]
    assert rows["text_offset"] == [len("".join(rows["tokens"][:i])) for i in range(8)]
    assert all(tokens in top for tokens, top in zip(rows["tokens"], rows["top_logprobs"], strict=True))
    joined: dict[str, list[Any]] = {name: [] for name in rows}
    for event in streamed(engine, "completions", prompt=PROMPT, temperature=0.0, max_tokens=8, logprobs=2):
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == rows


@pytest.mark.parametrize("most", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(engine: RealEngine, llm: LLM, most: int, stream: bool) -> None:
    """What lm-eval asks: token ids in, the log-probability of each out."""
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(PROMPT)
    asked: dict[str, Any] = {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
    if stream:
        event, *more = streamed(engine, "completions", **asked)
        choice = event["choices"][0]
        assert not more
    else:
        choice = answer_of(engine, "completions", **asked)["choices"][0]
    expected = offline(llm, PROMPT, temperature=0.0, max_tokens=1, prompt_logprobs=1)
    scores = [s and s[t] for t, s in zip(ids, expected.prompt_logprobs, strict=True)]
    rows = choice["logprobs"]
    assert rows["token_logprobs"][: len(ids)] == scores and rows["token_logprobs"][0] is None
    assert {len(values) for values in rows.values()} == {len(ids) + most}
    said = expected.outputs[0].text if most else ""
    assert choice["text"] == PROMPT + said and choice["finish_reason"] == "length"
    for token, offset in [*zip(rows["tokens"], rows["text_offset"], strict=True)][1:]:
        assert choice["text"][offset:].startswith(token)


def test_echo_of_several_texts_and_prompt_logprobs(engine: RealEngine) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "The"], "echo": True, "logprobs": 0, "n": 2, "seed": 1, "max_tokens": 3}
    whole = answer_of(engine, "completions", **asked)["choices"]
    parts: dict[int, tuple[str, int]] = {}
    for event in streamed(engine, "completions", **asked):
        choice = event["choices"][0]
        text, rows = parts.get(choice["index"], ("", 0))
        parts[choice["index"]] = text + choice["text"], rows + len((choice["logprobs"] or {"tokens": []})["tokens"])
    assert parts == {c["index"]: (c["text"], len(c["logprobs"]["tokens"])) for c in whole}
    scored = answer_of(engine, "completions", prompt=PROMPT, prompt_logprobs=1, max_tokens=1)["choices"][0]
    first, *rest = scored["prompt_logprobs"]
    assert first is None and all({"logprob", "decoded_token"} == {*row} for each in rest for row in each.values())
    Completion.model_validate(answer_of(engine, "completions", prompt=PROMPT, prompt_logprobs=1, max_tokens=1))


def test_counts_come_with_every_event_where_asked(engine: RealEngine) -> None:
    options = {"continuous_usage_stats": True}
    events = streamed(engine, "completions", prompt=PROMPT, max_tokens=5, temperature=0, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [9999]}, "vocabulary"),
    ({"prompt": [-1]}, "vocabulary"), ({"prompt": [2**70]}, "vocabulary"),
    ({"prompt": "x" * 200_000}, "tokens"), ({"prompt": [5] * 1024}, "1023"), ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "colour": 1}, "colour"), ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"), ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
    ({"prompt": "a", "temperature": -1}, "temperature"), ({"prompt": "a", "temperature": 1e300}, "temperature"),
    ({"prompt": "a", "n": 0}, "n="), ({"prompt": "a", "n": 129}, "n"), ({"prompt": "a", "n": 10**9}, "n="),
    ({"prompt": ["a"] * 257}, "prompt"), ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"), ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias"), ({"prompt": "a", "logit_bias": {"1": 101}}, "bias"),
    ({"prompt": "a", "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    ({"prompt": "a", "stop": [""]}, "stop"), ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    ({"prompt": "a", "stop": "x" * 257}, "stop"), ({"prompt": "a", "stream_options": {}}, "stream_options"),
    ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"), ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt": "a", "timeout": 0}, "timeout"), ({"prompt": "a", "priority": 2**40}, "priority"),
    ({"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, ""), ({"prompt": "a", "structured_outputs": {}}, ""),
    ({"prompt": "a", "use_beam_search": True, "temperature": 1}, "temperature"),
    ({"prompt": "a", "response_format": {"type": "json_schema"}}, "json_schema"),
]  # fmt: skip


def test_what_is_wrong_is_refused_by_name_and_the_next_request_runs(engine: RealEngine) -> None:
    async def work(ask: Ask) -> None:
        for body, name in WRONG:
            response = await asyncio.wait_for(ask("completions", **body), 5)
            error = response.json()["error"]
            assert response.status_code == 400, (body, response.text)
            assert name in error["message"], (str(body)[:100], error)
            assert len(response.content) < 2500
        assert (await ask("completions", prompt=PROMPT, model="other")).status_code == 404
        assert (await ask("completions", prompt=PROMPT, model="bundled", user="me")).status_code == 200

    asking(engine, work)


def test_the_length_of_a_prompt_is_openais_code(engine: RealEngine) -> None:
    for prompt in ("x" * 200_000, [5] * 5000):
        assert ask_once(engine, "completions", prompt=prompt).json()["error"]["code"] == "context_length_exceeded"


def test_a_deadline_is_the_servers_or_the_requests(engine: RealEngine) -> None:
    long: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True}

    async def work(ask: Ask) -> None:
        choice = (await ask("completions", **long)).json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "timeout") and choice["text"]
        own = (await ask("completions", prompt=PROMPT, timeout=60.0, ignore_eos=True)).json()["choices"][0]
        assert (own["finish_reason"], own["stop_reason"]) == ("length", None)
        assert (await ask("completions", **long, timeout=1e-6)).status_code == 408

    asking(engine, work, timeout=0.3)
    assert too_late("token", own=False).status == 503


def test_an_engine_that_dies_ends_a_stream_with_an_error_and_anything_else_with_its_status(engine: RealEngine) -> None:
    first = [Part("r", 0, [300])]
    stream = told(engine, "completions", [Script([first, EngineDied("dead")])], {"prompt": "a", "stream": True})
    assert stream.status_code == 200
    *events, last = [json.loads(each.removeprefix("data: ")) for each in stream.text.split("\n\n") if each]
    assert len(events) == 1 and last["error"]["code"] == "engine_died"
    assert told(engine, "completions", [Script([first, EngineDied("dead")])], {"prompt": "a"}).status_code == 500
    assert (
        told(engine, "completions", [Script([EngineDied("dead")])], {"prompt": "a", "stream": True}).status_code == 500
    )
    unready = told(engine, "completions", [EngineUnready("loading", 2.0)], {"prompt": "a", "stream": True})
    assert unready.status_code == 503 and unready.headers["retry-after"] == "2"


def test_one_prompt_that_fails_ends_the_others(engine: RealEngine) -> None:
    good, bad = Script([[Part("r", 0, [300])]] * 3), Script([EngineDied("dead")])
    assert told(engine, "completions", [good, bad], {"prompt": ["a", "b"]}).status_code == 500
    assert good.aborts == [None]
    late = Script([])
    assert told(engine, "completions", [late, EngineUnready("loading", 2.0)], {"prompt": ["a", "b"]}).status_code == 503
    assert late.aborts == [None]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(engine: RealEngine, stream: bool) -> None:
    async def run() -> tuple[Noted, list[dict[str, Any]]]:
        app, noted = app_on(engine)
        body = json.dumps({"prompt": PROMPT, "max_tokens": 1000, "ignore_eos": True, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            while not (sent if stream else noted.submitted):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(dict(message))

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "raw_path": b"",
                 "query_string": b""}  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 20)
        await engine.idle()
        return noted, sent

    noted, sent = engine.run(run)
    assert noted.aborted == [(noted.submitted[0].id, None)]
    assert bool(sent) == stream


def test_watchers_hear_of_every_request_to_the_engine(engine: RealEngine) -> None:
    heard: list[Any] = []

    class Watcher:
        def __init__(self, new: Submit) -> None:
            heard.append(("started", len(new.prompt)))

        def parts(self, parts: Any) -> None:
            heard.append(("parts", sum(len(part.tokens) for part in parts)))

        def ended(self, error: BaseException | None = None, reasons: Any = None) -> None:
            heard.append(("ended", error, reasons))

    async def run() -> str:
        app, _ = app_on(engine)
        app.serving.hooks.started = lambda request_id, new, most, headers: Watcher(new)
        async with client_of(app) as client:
            found = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, "stream": True})
            return str(found.text)

    events_of(engine.run(run))
    assert heard[0] == ("started", 4) and heard[-1] == ("ended", None, {})
    assert sum(each[1] for each in heard[1:-1]) == 4
