"""Models, version, health, tokenizing, and the document that describes all endpoints."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.responses import Response

from penstock.serve.answers import answer
from penstock.serve.openapi import document
from penstock.serve.routes import ROUTES
from penstock.serve.wire import Beat
from penstock.text import Tokenizer
from tests.cpu.serve.doubles import ECHO, FACTS, StillEngine, app_of, client_of


def ask(method: str, path: str, engine: StillEngine | None = None, body: Any = None, **config: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(app_of(*ROUTES, engine=engine, **config)) as client:
            return await client.request(method, path, json=body)

    return asyncio.run(run())


def test_models() -> None:
    listed = ask("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == ["bundled"]
    assert listed["data"][0]["max_model_len"] == FACTS["max_seq_len"]
    named = ask("GET", "/v1/models", served_model_names=("org/name", "b")).json()
    assert [each["id"] for each in named["data"]] == ["org/name", "b"]
    assert ask("GET", "/v1/models/org/name", served_model_names=("org/name",)).json()["root"] == "bundled"
    unknown = ask("GET", "/v1/models/bundled", served_model_names=("org/name",))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert ask("GET", "/v1/models", StillEngine(state="loading", facts={})).status_code == 503


def test_health_says_how_it_is_without_waiting() -> None:
    stats = {"requests_running": 2, "requests_waiting": 1}
    beat = Beat(time.monotonic(), 5, time.monotonic() - 3.0, True, stats)
    well = ask("GET", "/health", StillEngine(beat=beat))
    assert well.status_code == 200
    told = well.json()
    assert (told["running"], told["waiting"], told["status"]) == (2, 1, "ok")
    assert 3.0 <= told["seconds_since_step"] < 4.0
    ill = ask("GET", "/health", StillEngine(beat=beat), well=(False, "no step for 30 s"))
    assert ill.status_code == 503 and "no step" in ill.json()["reason"]


def test_tokenize_and_back() -> None:
    tokenizer = Tokenizer.from_dir(FACTS["directory"])
    text = "Once upon a time" * 1000
    for special in (True, False):
        told = ask("POST", "/tokenize", body={"prompt": text, "add_special_tokens": special}).json()
        assert told["tokens"] == tokenizer.encode(text, special) and told["count"] == len(told["tokens"])
        assert told["token_strs"] is None and told["max_model_len"] == FACTS["max_seq_len"]
    assert ask("POST", "/detokenize", body={"tokens": told["tokens"]}).json() == {"prompt": text}


def test_what_takes_long_of_a_text_is_done_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, write = set[bool](), answer

    def noted(told: Any) -> Response:
        seen.add(threading.current_thread() is threading.main_thread())
        return write(told)

    monkeypatch.setattr("penstock.serve.routes.tokenize.answer", noted)
    told = ask("POST", "/tokenize", body={"prompt": "a " * 6000, "return_token_strs": True}).json()
    assert len(told["token_strs"]) == told["count"] > 6000 and seen == {False}


@pytest.mark.parametrize("token", [-1, FACTS["vocab_size"], 2**70])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    refused = ask("POST", "/detokenize", body={"model": "bundled", "tokens": [1, token]})
    assert refused.status_code == 400 and "vocabulary" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapters_are_refused_by_name(path: str) -> None:
    refused = ask("POST", path, body={"lora_name": "a", "lora_path": "/a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported")
    assert path in refused.json()["error"]["message"]


def test_the_document_describes_what_is_there() -> None:
    made = ask("GET", "/openapi.json").json()
    described = {(method.upper(), path) for path, methods in made["paths"].items() for method in methods}
    assert described == {(each.method, each.path.replace(":path}", "}")) for each in ROUTES}
    assert made["paths"]["/tokenize"]["post"]["responses"].keys() == {"200", "400", "404", "408", "413", "503"}
    for schema in made["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "security" not in str(made)
    shut = document((*ROUTES, ECHO), True)["paths"]
    assert "401" in shut["/echo"]["post"]["responses"] and "401" not in shut["/health"]["get"]["responses"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_document_describes_events_and_their_end(path: str) -> None:
    made = document(ROUTES, False)
    events = made["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    (end, payload) = events["properties"]["data"]["anyOf"]
    jsonschema.validate("[DONE]", end)
    schema = {**payload["contentSchema"], "components": made["components"]}
    jsonschema.validate({"error": {"message": "a", "type": "b", "param": None, "code": None}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"choices": []}, schema)


ANSWERS: list[tuple[str, str, Callable[[], Any]]] = [
    ("get", "/v1/models", lambda: None), ("get", "/version", lambda: None), ("get", "/health", lambda: None),
    ("post", "/tokenize", lambda: {"prompt": "a"}), ("post", "/detokenize", lambda: {"tokens": [5]}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), ANSWERS)
def test_answers_are_as_they_are_described(method: str, path: str, body: Callable[[], Any]) -> None:
    made = document(ROUTES, False)
    schema = made["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
    response = ask(method.upper(), path, body=body())
    assert response.status_code == 200
    jsonschema.validate(response.json(), {**schema, "components": made["components"]})
