"""Lines on stderr: one a request, as text or JSON, and nothing of what was said."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import re
import time
from collections.abc import Callable, Iterator

import pytest

from penstock.errors import PromptError
from penstock.serve.live import Live
from penstock.serve.logs import config, say
from penstock.serve.metrics import Metrics
from penstock.serve.serving import Answered, Hooks
from penstock.serve.watch import Watch
from penstock.serve.wire import Part, Submit, Times
from tests.cpu.serve.doubles import StillEngine

Lines = Callable[[], list[str]]
NAMES = ("penstock", "uvicorn", "uvicorn.access", "uvicorn.error", "opentelemetry")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Lines]]:
    """Configure logging; gives what has come to stderr."""
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level,
                     logging.getLogger(name).propagate) for name in NAMES}  # fmt: skip

    def start(kind: str, level: str = "info") -> Lines:
        stream = io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        logging.config.dictConfig(config(kind, level))  # type: ignore[arg-type]
        return lambda: stream.getvalue().splitlines()

    yield start
    for name, (handlers, at, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(at)


def answer(
    hooks: Hooks, route: str = "/v1/completions", status: int = 200, gone: bool = False, refused: str | None = None
) -> None:
    hooks.answered[0](Answered("req-1", "POST", route, status, time.monotonic(), 0.25, gone, refused))


@pytest.fixture
def hooks() -> Hooks:
    made = Hooks()
    Watch(Metrics(Live(StillEngine()), lambda: "bundled")).join(made)
    return made


def request(hooks: Hooks) -> None:
    """An HTTP request with two prompts."""
    assert hooks.started is not None
    for last in (2.5, 3.0):
        new = Submit("cmpl-1", [5, 6, 7], {"bad_words": ["secret word"]}, 0.001, cache_salt="secret salt")
        watched = hooks.started("req-1", new, 4, [(b"authorization", b"Bearer secret key")])
        watched.parts([Part("cmpl-1", 0, [1, 2], "stop", times=Times(0.001, 1.501, last, 0.501))])
        watched.ended()


def test_a_request_is_one_line_of_json(logged: Callable[[str], Lines], hooks: Hooks) -> None:
    lines = logged("json")
    request(hooks)
    answer(hooks)
    (line,) = lines()
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found.pop("first_token_seconds") > 0
    assert found == {
        "level": "info", "logger": "penstock.serve", "message": "request", "request_id": "req-1", "method": "POST",
        "route": "/v1/completions", "status": 200, "seconds": 0.25, "id": "cmpl-1", "prompts": 2, "prompt_tokens": 6,
        "generation_tokens": 4, "queue_seconds": 0.5, "prefill_seconds": 1.0, "decode_seconds": 1.499, "finish": "stop",
    }  # fmt: skip
    assert "secret" not in line


def test_the_same_as_text(logged: Callable[[str], Lines], hooks: Hooks) -> None:
    lines = logged("text")
    request(hooks)
    answer(hooks, status=200, gone=True)
    answer(hooks, status=404, refused="model_not_found")
    line, other = lines()
    assert " status=404 " in other and other.endswith(" refused=model_not_found")
    assert " INFO request request_id=req-1 method=POST route=/v1/completions status=200 seconds=0.25 " in line
    assert " client_gone=true " in line
    assert line.endswith("finish=stop")


def test_what_is_polled_has_no_line(logged: Callable[[str], Lines], hooks: Hooks) -> None:
    """Unless whoever asks for it has no key."""
    lines = logged("text")
    for route, status in (("/health", 200), ("/health", 503), ("/live", 200), ("/metrics", 200)):
        answer(hooks, route, status)
    assert lines() == []
    answer(hooks, "/metrics", 401)
    assert "status=401" in lines()[0]


@pytest.mark.parametrize("kind", ["text", "json"])
def test_an_unexpected_error_is_told_without_its_words(logged: Callable[[str], Lines], hooks: Hooks, kind: str) -> None:
    lines = logged(kind)
    try:
        try:
            {}["a secret prompt"]  # type: ignore[index]
        except KeyError as error:
            raise PromptError("a secret text") from error
    except PromptError as error:
        hooks.failed[0]("req-1", error)
    (line,) = lines()
    assert "secret" not in line
    assert "PromptError from KeyError" in line and "test_logs.py:" in line and "req-1" in line


@pytest.mark.parametrize("kind", ["text", "json"])
def test_a_line_stays_a_line(logged: Callable[[str], Lines], kind: str) -> None:
    lines = logged(kind)
    say("one\nERROR two", {"name": 'three\n"four"'})
    (line,) = lines()
    assert "four" in line


def test_uvicorn_writes_the_same_way_and_no_access_lines(logged: Callable[[str], Lines]) -> None:
    lines = logged("json")
    logging.getLogger("uvicorn.error").info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.access").info("GET / 200")
    (line,) = lines()
    assert json.loads(line)["message"] == "Started server process [7]"


def test_levels(logged: Callable[..., Lines]) -> None:
    lines = logged("text", "warning")
    say("not told", {})
    say("told", {}, logging.ERROR)
    assert [line.split(" ", 1)[1] for line in lines()] == ["ERROR told"]
