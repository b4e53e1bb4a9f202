"""Run by an interpreter of its own that has the official client, whichever version: what users of it call.

`openai_calls.py URL`; prints what it found as JSON. An answer that is not what the client's types say is an error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

PROMPT = "In the beginning"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}]


def check(data: Any) -> Any:
    """As its own type says: the client itself takes anything. OpenAI's chunks of completions have a finish_reason of
    null until the last, which their type has forgotten."""
    plain = json.loads(data.model_dump_json())
    for choice in plain.get("choices", ()) if plain.get("object") == "text_completion" else ():
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    type(data).model_validate(plain)
    return data


def completions(client: openai.OpenAI, model: str) -> dict[str, Any]:
    common: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = check(client.completions.create(**common))
    text = whole.choices[0].text
    assert whole.usage.completion_tokens == 12 and whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert whole.choices[0].finish_reason in ("length", "stop") and whole.model == model

    parts = [check(part) for part in client.completions.create(**common, stream=True)]
    assert "".join(part.choices[0].text for part in parts) == text and parts[-1].choices[0].finish_reason == "length"
    counted = [*client.completions.create(**common, stream=True, stream_options={"include_usage": True})]
    assert counted[-1].usage.completion_tokens == 12 and not counted[-1].choices

    several = check(client.completions.create(**{**common, "temperature": 1}, n=3, seed=4))
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    again = client.completions.create(**{**common, "temperature": 1}, n=3, seed=4)
    assert [c.text for c in several.choices] == [c.text for c in again.choices], "the same seed gives the same texts"

    scored = check(client.completions.create(**common, logprobs=2)).choices[0].logprobs
    assert len(scored.tokens) == 12 == len(scored.token_logprobs) and "".join(scored.tokens) == text
    assert all(value <= 0 for value in scored.token_logprobs) and len(scored.top_logprobs[0]) >= 2
    echoed = client.completions.create(**{**common, "max_tokens": 1}, echo=True, logprobs=1).choices[0]  # null at first
    assert echoed.text.startswith(PROMPT) and echoed.logprobs.token_logprobs[0] is None

    batch = check(client.completions.create(**{**common, "prompt": [PROMPT, "Once more"]}))
    assert len(batch.choices) == 2 and batch.choices[0].text == text
    ids = check(client.completions.create(**{**common, "prompt": [[5, 6, 7], [8, 9]]}))
    assert len(ids.choices) == 2 and ids.usage.prompt_tokens == 5
    stopped = check(client.completions.create(**common, stop=[text[4:7]])).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(text[4:7])]
    return {"text": text, "chunks": len(parts)}


def chat(client: openai.OpenAI, model: str) -> dict[str, Any]:
    common: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0}
    whole = check(client.chat.completions.create(**common))
    said = whole.choices[0].message
    assert said.role == "assistant" and whole.usage.completion_tokens <= 10
    parts = [check(part) for part in client.chat.completions.create(**common, stream=True)]
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason is not None
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said.content
    scored = check(client.chat.completions.create(**common, logprobs=True, top_logprobs=3)).choices[0].logprobs
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in scored.content)
    several = check(client.chat.completions.create(**{**common, "temperature": 1}, n=2))
    assert len(several.choices) == 2
    return {"text": said.content}


def errors(client: openai.OpenAI, model: str) -> dict[str, Any]:
    found = {}
    for kind, fields in (
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": -5}),
        (openai.BadRequestError, {"extra_body": {"no_such_field": 1}}),
        (openai.BadRequestError, {"prompt": [1 << 30]}),
    ):
        try:
            client.completions.create(**{"model": model, "prompt": PROMPT, **fields})
        except kind as error:
            assert isinstance(error.body, dict) and error.body["message"], error.body
            found[str(fields)] = error.body["message"]
        else:
            raise AssertionError(f"{fields} was taken")
    return found


async def together(url: str, model: str) -> int:
    """Sixteen at once, on the client for asyncio."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

        async def one(i: int) -> int:
            stream = await client.completions.create(
                model=model, prompt=[5 + i, 6, 7], max_tokens=8, stream=True, extra_body={"ignore_eos": True},
                stream_options={"include_usage": True},
            )  # fmt: skip
            return [part.usage.completion_tokens async for part in stream if part.usage][-1]

        return sum(await asyncio.gather(*(one(i) for i in range(16))))


def main(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    model = check(next(iter(client.models.list()))).id
    assert client.models.retrieve(model).id == model
    found = {
        "version": openai.__version__, "model": model, "completions": completions(client, model),
        "chat": chat(client, model), "errors": errors(client, model),
        "tokens_of_sixteen": asyncio.run(together(url, model)),
    }  # fmt: skip
    assert found["tokens_of_sixteen"] == 128
    print(json.dumps(found))


main(sys.argv[1])
