"""The frame of the server: errors as OpenAI's JSON, bodies, sizes, request ids, methods and paths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from penstock.errors import LengthError, QueueFullError, SamplingError, UnsupportedError
from penstock.serve.link import EngineDied, EngineUnready
from penstock.serve.serving import Answered
from tests.cpu.serve.doubles import ECHO, app_of, client_of, raising

ERRORS = [
    (SamplingError("temperature=9 is too hot"), 400, "invalid_value", "temperature"),
    (LengthError("the prompt has 9 tokens"), 400, "context_length_exceeded", None),
    (QueueFullError("request 'a' is refused: 3 wait"), 429, "queue_full", None),
    (UnsupportedError("suffix is not built yet"), 400, "unsupported", None),
    (EngineUnready("loading", 7.0), 503, "engine_unready", None),
    (EngineDied("killed, see /srv/secret/crash.json"), 500, "engine_died", None),
    (RuntimeError("/srv/secret"), 500, "internal_error", None),
    (SamplingError("x" * 100_000), 400, "invalid_value", None),
]


@pytest.mark.parametrize(("error", "status", "code", "param"), ERRORS)
def test_an_error_has_one_status_and_shape(error: Exception, status: int, code: str | None, param: str | None) -> None:
    async def run() -> None:
        async with client_of(app_of(raising(error))) as client:
            response = await client.get("/fail")
        told = response.json()
        assert response.status_code == status
        assert told.keys() == {"error"}
        assert told["error"].keys() == {"message", "type", "param", "code"}
        assert (told["error"]["code"], told["error"]["param"]) == (code, param)
        assert "/srv" not in response.text and len(response.content) < 2500
        assert ("retry-after" in response.headers) == (status in (429, 503))

    asyncio.run(run())


BODIES = [
    b"", b"{", b"[]", b"null", b'{"number": NaN}', b'{"number": Infinity}', b'{"number": 1e999}', b'{"number": "1"}',
    b'{"number": true}', b'{"number": 1, "number": 2}', b'{"number": 1, "other": 2}', b'{"number": -1}',
    b'{"number": 1, "words": [1]}', b'{"number": 1, "words": ["a","b","c","d","e"]}', b'\xff{"number": 1}',
    b'{"number": 1, "words": ["\\ud800"]}', b"[" * 100_000, b'{"a":' * 50_000, b'{"number": ' + b"9" * 10_000 + b"}",
    b'{"number": 1' + b"".join(b', "k%d": 1' % i for i in range(20_000)) + b"}",
    b'{"words": [' + b",".join([b"{}"] * 100_000) + b"]}", b'{"words": [' + b",".join([b"1"] * 500_000) + b"]}",
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=[f"{b[:24]!r}-{len(b)}" for b in BODIES])
def test_a_malformed_body_is_a_400_of_bounded_size(body: bytes) -> None:
    async def run() -> None:
        async with client_of(app_of(ECHO)) as client:
            response = await asyncio.wait_for(client.post("/echo", content=body), 2.0)
            assert response.status_code == 400, response.text
            assert len(response.content) < 2500
            assert response.json()["error"]["message"]
            assert (await client.post("/echo", json={"number": 1})).status_code == 200

    asyncio.run(run())


def test_a_wrong_field_is_named() -> None:
    async def run() -> None:
        async with client_of(app_of(ECHO)) as client:
            response = await client.post("/echo", content=b'{"number": "abc", "colour": 3}')
        error = response.json()["error"]
        assert (
            "number" in error["message"] and "abc" in error["message"] and "unknown field 'colour'" in error["message"]
        )
        assert error["param"] == "number"

    asyncio.run(run())


def test_paths_and_methods() -> None:
    async def run() -> None:
        async with client_of(app_of(ECHO)) as client:
            wrong, unknown = await client.get("/echo"), await client.get("/ech%6f/" + "x" * 5000)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert unknown.status_code == 404 and len(unknown.content) < 1000

    asyncio.run(run())


def test_a_request_id_is_taken_where_it_is_sane_and_told_to_the_hooks() -> None:
    async def run() -> None:
        app = app_of(ECHO)
        heard: list[Answered] = []
        app.serving.hooks.answered.append(heard.append)
        async with client_of(app) as client:
            ids = ["abc-1", "a b", "x" * 129, "a\x7f"]
            answers = [await client.post("/echo", json={"number": 1}, headers={"x-request-id": i}) for i in ids]
        given = [each.headers["x-request-id"] for each in answers]
        assert given[0] == "abc-1" and not set(given[1:]) & set(ids) and len(set(given)) == 4
        assert [each.request_id for each in heard] == given
        assert {(each.route, each.status, each.gone, each.refused) for each in heard} == {("/echo", 200, False, None)}
        async with client_of(app) as client:
            await client.post("/echo", json={"numbers": 1})
        assert (heard[-1].status, heard[-1].refused) == (400, "missing_required_parameter")

    asyncio.run(run())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_large_body_is_refused_before_it_is_read(streamed: bool) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 1000

    async def run() -> None:
        async with client_of(app_of(ECHO, max_body_bytes=5000)) as client:
            content = pieces() if streamed else b" " * 5001
            response = await client.post("/echo", content=content)
            assert response.status_code == 413 and response.headers["connection"] == "close"
            assert (await client.post("/echo", content=json.dumps({"number": 1}).ljust(5000))).status_code == 200

    asyncio.run(run())
    assert sent < 15


def test_a_body_that_does_not_come_ends_the_request() -> None:
    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    async def run() -> None:
        async with client_of(app_of(ECHO, body_timeout=0.05)) as client:
            response = await client.post("/echo", content=stuck())
            assert response.status_code == 408

    asyncio.run(run())
