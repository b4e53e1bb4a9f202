"""What clients may do to a server with the real engine, beside sending what is no request."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from penstock.text import Tokenizer
from tests.cpu.serve.asking import answer_of, app_on
from tests.cpu.serve.doubles import FACTS, client_of
from tests.cpu.serve.real import RealEngine


def test_health_counts_what_the_engine_counts(engine: RealEngine) -> None:
    """And nothing any more once all clients have left."""

    async def run() -> None:
        app, _ = app_on(engine)
        async with client_of(app) as client:

            async def told(running: int) -> dict[str, Any]:
                end = time.monotonic() + 5
                found = {"running": -1}
                while found["running"] != running:
                    assert time.monotonic() < end, found
                    await asyncio.sleep(0.05)
                    found = (await client.get("/health")).json()
                return found

            body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 3}
            left = asyncio.create_task(client.post("/v1/completions", json=body, timeout=60))
            found = await told(3)
            assert found["waiting"] == 0 and found["seconds_since_step"] < 60
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            await told(0)

    engine.run(run)


def test_special_tokens_in_messages_are_special(engine: RealEngine) -> None:
    """As with Hugging Face and vLLM; see `prompts.chat_text`."""
    tokenizer = Tokenizer.from_dir(FACTS["directory"])
    special = min(tokenizer.special_ids)
    word = tokenizer.id_to_token(special)

    def length(content: str) -> int:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return int(answer_of(engine, "chat/completions", **body)["usage"]["prompt_tokens"])

    assert length(f"a{word}b") == length(f"a{word}{word}b") - 1
