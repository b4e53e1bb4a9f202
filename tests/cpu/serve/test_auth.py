"""Keys: everything is shut but what is open, however the path or the key is written; nothing tells a key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import OptionError
from penstock.serve.config import ServeConfig, read_keys
from penstock.serve.guard import OPEN
from penstock.serve.routes import ROUTES
from tests.cpu.serve.doubles import ECHO, app_of, client_of

KEY, OTHER = "sk-first-key-1234", "sk-second-key-5678"


def keyed(**config: Any) -> Any:
    return app_of(*ROUTES, ECHO, api_keys=(KEY, OTHER), **config)


async def call(app: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """By plain ASGI, so that a path goes in as it is written."""
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b'{"number": 1}', "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], told, sent[1]["body"]


def test_every_endpoint_asks_for_a_key() -> None:
    async def run() -> None:
        app = keyed()
        for each in (*ROUTES, ECHO):
            status, headers, body = await call(app, each.path, each.method)
            is_open = each.method == "GET" and each.path in OPEN
            assert (status == 401) != is_open, each.path
            if status == 401:
                assert (
                    headers["www-authenticate"] == "Bearer" and b"invalid_api_key" in body and KEY.encode() not in body
                )

    asyncio.run(run())


PATHS = [
    "/health/", "//health", "/health/../version", "/version/", "/HEALTH", "/health%2f..%2fversion", "/health?x", "",
    "*", "http://a/health", "/v1/models#/health", "/nothing", "/health\x00",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_other_way_to_write_a_path_opens_it(path: str) -> None:
    for host in ("a", "a/health", "/health?"):
        assert asyncio.run(call(keyed(), path, host=host))[0] == 401


def test_only_reading_is_open() -> None:
    assert asyncio.run(call(keyed(), "/health", "HEAD"))[0] == 200
    for method in ("POST", "PUT", "OPTIONS", "DELETE", "get"):
        assert asyncio.run(call(keyed(), "/health", method))[0] == 401


GIVEN: list[tuple[dict[str, str], int]] = [
    ({"authorization": f"Bearer {KEY}"}, 200),
    ({"authorization": f"bearer  {OTHER}"}, 200),
    ({"x_api_key": OTHER}, 200),
    ({"authorization": "Bearer wrong", "x_api_key": KEY}, 200),
    ({"authorization": f"Basic {KEY}"}, 401),
    ({"authorization": KEY}, 401),
    ({"authorization": "Bearer "}, 401),
    ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
    ({"authorization": f"Bearer {KEY}{OTHER}"}, 401),
    ({"x_api_key": ""}, 401),
    ({"x_api_key": "\u00ff"}, 401),
    ({"cookie": f"key={KEY}"}, 401),
]


@pytest.mark.parametrize(("headers", "status"), GIVEN)
def test_what_counts_as_a_key(headers: dict[str, str], status: int) -> None:
    assert asyncio.run(call(keyed(), "/version", **headers))[0] == status


def test_a_page_of_another_host_may_call_where_it_is_allowed() -> None:
    async def run() -> None:
        asks = {"origin": "https://page", "access-control-request-method": "POST"}
        async with client_of(keyed(cors_origins=("https://page",))) as client:
            assert (await client.options("/echo", headers=asks)).status_code == 200
            refused = await client.post("/echo", headers={"origin": "https://page"}, json={"number": 1})
            assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "https://page"
            other = await client.get("/health", headers={"origin": "https://other"})
            assert "access-control-allow-origin" not in other.headers
        async with client_of(keyed()) as client:
            assert (await client.options("/echo", headers=asks)).status_code == 401

    asyncio.run(run())


def test_keys_are_read_from_a_file_and_shown_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n  {OTHER}  \n")
    assert read_keys(path) == (KEY, OTHER)
    assert KEY not in repr(ServeConfig(api_keys=read_keys(path)))
    for text in ("", "# none\n", "short\n", "has space in it\n", "\u00e4" * 20):
        path.write_text(text)
        with pytest.raises(OptionError) as refused:
            read_keys(path)
        assert not text or text.strip() not in str(refused.value)
    with pytest.raises(OptionError, match="No such file"):
        read_keys(tmp_path / "none")


WRONG: list[dict[str, Any]] = [
    {"port": 70000}, {"port": -1}, {"max_body_bytes": 0}, {"max_n": 0}, {"timeout": 0.0}, {"timeout": float("nan")},
    {"drain_timeout": -1.0}, {"stall_timeout": 0.0}, {"hang_timeout": float("inf")}, {"log_format": "xml"},
    {"log_level": "loud"}, {"served_model_names": ("",)}, {"cors_origins": ("page",)}, {"ssl_keyfile": Path("x")},
    {"api_keys": ("short",)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_an_option_outside_its_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ServeConfig(**wrong)
