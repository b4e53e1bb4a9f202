"""The page at /, in a real browser."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from penstock.serve.app import create_app
from penstock.serve.config import ServeConfig
from penstock.serve.live import Live
from penstock.serve.routes import page as page_routes
from penstock.serve.serving import Endpoint, Serving
from penstock.serve.wire import Beat
from tests.cpu.serve.doubles import StillEngine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key-for-tests"
MARKUP = "<img src=x onerror='document.title=1'> <b>bold</b>"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn"),
]


class MovingEngine(StillEngine):
    """Whose beats say that something happens: 100 tokens a second, half of the roof."""

    @property
    def beat(self) -> Beat:  # type: ignore[override]
        now = time.monotonic()
        stats = {
            "steps": int(now * 100), "generated_tokens": int(now * 100), "device_seconds": now, "roof_seconds": now / 2,
            "requests_running": 1 + int(now) % 2, "requests_waiting": 3, "kv_cache_usage": 0.25,
        }  # fmt: skip
        return Beat(now, stats["steps"], now, True, stats)

    @beat.setter
    def beat(self, value: Beat | None) -> None: ...


class Words:
    """A chat endpoint that streams what it was asked, word by word, slowly, and keeps the bodies that came."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.gone = 0

    async def __call__(self, request: Any, serving: Serving) -> Any:
        from starlette.responses import StreamingResponse

        body = await request.json()
        self.bodies.append(body)
        return StreamingResponse(self._events(body["messages"][-1]["content"]), media_type="text/event-stream")

    async def _events(self, text: str) -> Any:
        from json import dumps

        try:
            for word in text.split(" "):
                delta = {"choices": [{"index": 0, "delta": {"content": word + " "}, "finish_reason": None}]}
                yield f"data: {dumps(delta)}\n\n"
                await asyncio.sleep(0.03)
        except (asyncio.CancelledError, GeneratorExit):
            self.gone += 1
            raise
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}}
        for event in (dumps(last), dumps(usage), "[DONE]"):
            yield f"data: {event}\n\n"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an application that uvicorn serves in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


class Watched:
    """A page, the errors on its console, and the hosts that it asked."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page()
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))
        self.page.goto(url)
        self.page.set_default_timeout(5000)

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def wait(self, condition: str, seconds: float = 5) -> None:
        """Until it holds, asked from here: the page's own policy lets no string be run in it."""
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, (condition, self.errors, self.page.inner_text("body"))
            self.page.wait_for_timeout(20)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def url(words: Words) -> Iterator[str]:
    engine = MovingEngine()
    chat = Endpoint("POST", "/v1/chat/completions", words, "Say it again.")
    routes = [*page_routes.endpoints(Live(engine)), chat]
    with served(create_app(ServeConfig(api_keys=(KEY,)), engine, routes)) as found:
        yield found


@pytest.fixture
def opened(browser: Any, url: str) -> Iterator[Watched]:
    watched = Watched(browser, url)
    yield watched
    watched.page.close()


LAST = "document.querySelector('article:last-of-type pre').textContent"


def test_it_streams_an_answer_as_text_and_asks_nobody_else(opened: Watched, words: Words, url: str) -> None:
    page = opened.page
    page.click("summary")
    page.fill("#key", KEY)
    page.fill("input[name=temperature]", "0.5")
    page.fill("input[name=seed]", "7")
    opened.wait("document.getElementById('state').textContent === 'ready'")
    opened.errors.clear()  # the 401 before there was a key
    opened.ask(" ".join(["one", MARKUP, *map(str, range(20))]))
    opened.wait(f"{LAST}.startsWith('one') && !{LAST}.includes('19')")  # a part of it, before all is there
    opened.wait("document.querySelector('article.model small').textContent.includes('7 tokens')")
    assert MARKUP in page.text_content("article.model pre")
    assert page.locator("#log img, #log b").count() == 0
    assert page.title() == "Penstock"
    body = words.bodies[-1]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 128)
    assert "top_k" not in body, "what was left empty is not sent"
    opened.ask("two")
    opened.wait("document.querySelectorAll('article.model small')[1]?.textContent.includes('7 tokens')")
    assert [each["role"] for each in words.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert opened.hosts == {url}
    assert opened.errors == []


def test_its_gauges_move(opened: Watched) -> None:
    page = opened.page
    page.click("summary")
    page.fill("#key", KEY)
    opened.wait("document.getElementById('roof').textContent === '50.0 %'")
    assert page.text_content("#waiting") == "3"
    assert page.text_content("#kv") == "25.0 %"
    assert abs(int(page.text_content("#speed")) - 100) <= 5
    before = page.text_content("#running")
    opened.wait(f"document.getElementById('running').textContent !== '{before}'")


def test_stop_ends_an_answer(opened: Watched, words: Words) -> None:
    page, gone = opened.page, words.gone
    page.click("summary")
    page.fill("#key", KEY)
    opened.wait("document.getElementById('state').textContent === 'ready'")
    opened.ask(" ".join(map(str, range(1000))))
    opened.wait(f"{LAST}.startsWith('0 1')")
    assert page.is_disabled("#send")
    page.press("body", "Escape")
    opened.wait("document.querySelector('article.model small').textContent === 'stopped'")
    kept = page.text_content("article.model pre")
    deadline = time.monotonic() + 5
    while words.gone == gone and time.monotonic() < deadline:
        time.sleep(0.02)
    assert words.gone == gone + 1, "the server hears that nobody listens"
    assert page.text_content("article.model pre") == kept
    assert page.is_enabled("#send") and page.is_disabled("#stop")


def test_a_wrong_key_is_told(opened: Watched) -> None:
    page = opened.page
    opened.wait("document.getElementById('state').textContent === 'needs an API key'")
    page.click("summary")
    page.fill("#key", "wrong-key-here")
    opened.ask("hello")
    page.wait_for_selector("#error:not([hidden])")
    assert "no valid API key" in page.text_content("#error")
    assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
    assert page.evaluate("document.cookie") == ""


def test_every_control_has_a_name_and_colours_have_contrast(opened: Watched) -> None:
    """What assistive technology reads; WCAG's 4.5 to 1 for text, light and dark."""
    page = opened.page
    page.click("summary")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea, button')]"
        ".filter(e => !(e.labels?.length || e.textContent)).map(e => e.outerHTML)"
    )
    assert unnamed == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        ratios = page.evaluate(CONTRAST)
        assert ratios and min(ratios.values()) >= 4.5, (scheme, ratios)


CONTRAST = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/\\d+/g).map((v) => {
      v /= 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const [name, ink, paper] of [["body", "body", "body"], ["gauge", "dd", "#gauges div"],
      ["send", "#send", "#send"], ["stop", "#clear", "#clear"], ["error", "#error", "body"]]) {
    const a = light(getComputedStyle(document.querySelector(ink)).color);
    const b = light(getComputedStyle(document.querySelector(paper)).backgroundColor);
    found[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""
