"""A server's life, in a process of its own: opening, draining, ending; what a raw socket may send it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from penstock.serve.server import _watch

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[..., "Served"]


class Served:
    """A process that serves, and the lines it printed."""

    def __init__(self, options: dict[str, Any]) -> None:
        words = [sys.executable, "-m", "tests.cpu.serve.still_server", json.dumps({"port": 0, **options})]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        for stream, into in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=self._read, args=(stream, into), daemon=True).start()
        self.wait(lambda: bool(self.lines) or self.process.poll() is not None)
        self.port = int(self.lines[0]) if self.lines else 0
        self.url = f"http{'s' * ('ssl_certfile' in options)}://127.0.0.1:{self.port}"

    def _read(self, stream: Any, into: list[str]) -> None:
        with stream:
            into.extend(line.rstrip("\n") for line in stream)

    def wait(self, until: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, (self.lines, self.errors)
            time.sleep(0.01)

    def wait_for(self, line: str) -> None:
        self.wait(lambda: line in self.lines)

    def end(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(20)

    def raw(self, data: bytes) -> bytes:
        """What comes back for these bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            found = b""
            while piece := connection.recv(65536):
                found += piece
            return found


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Served] = []

    def one(**options: Any) -> Served:
        running.append(Served(options))
        return running[-1]

    yield one
    for each in running:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()


def test_it_listens_at_once_and_says_what_it_does_until_it_is_ready(start: Start) -> None:
    served = start(opens_in=1.0)
    with httpx.Client(base_url=served.url) as client:
        early, health = client.post("/tokenize", json={"prompt": "a"}), client.get("/health")
        assert (early.status_code, int(early.headers["retry-after"]) > 0) == (503, True)
        assert early.json()["error"]["code"] == "engine_unready"
        assert health.status_code == 503
        assert health.json()["state"] == "loading" and health.json()["progress"] == "weights 1 of 2"
        served.wait_for("ready")
        told = client.post("/tokenize", json={"prompt": "a", "return_token_strs": True}).json()
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"]) > 0
        assert client.get("/health").json()["progress"] is None
    assert served.end() == 0
    served.wait_for("light")  # no torch
    assert "weights 1 2" in served.errors and "weights 1 1" in served.errors


def test_a_stage_ends_once() -> None:
    link = SimpleNamespace(state="loading", progress=("cached", 1, 1))
    server: Any = SimpleNamespace()
    runner: Any = SimpleNamespace(link=link)
    told: list[tuple[str, int, int]] = []

    async def run() -> None:
        watch = asyncio.create_task(_watch(server, runner, lambda: None, lambda *news: told.append(news)))
        await asyncio.sleep(0.3)
        link.progress = ("load", 0, 2)
        await asyncio.sleep(0.3)
        link.state = "stopped"
        await watch

    asyncio.run(run())
    assert told == [("cached", 1, 1), ("load", 0, 2), ("load", 1, 1)]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start: Start, sig: int) -> None:
    served = start()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, f"{served.url}/slow", json={"number": 1.0}, timeout=20)
        served.wait_for("started")
        served.process.send_signal(sig)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
        assert running.result().json() == {"slept": 1.0}
    assert served.process.wait(10) == 0


def test_what_does_not_end_in_time_ends_with_the_engine(start: Start) -> None:
    served = start(drain_timeout=0.5)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, f"{served.url}/slow", json={"number": 60}, timeout=20)
        served.wait_for("started")
        begun = time.monotonic()
        assert served.end() == 0
        assert 0.4 < time.monotonic() - begun < 5
        assert running.result().status_code == 503


def test_a_second_signal_ends_at_once(start: Start) -> None:
    served = start()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(httpx.post, f"{served.url}/slow", json={"number": 60}, timeout=20)
        served.wait_for("started")
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        begun = time.monotonic()
        assert served.end() == 130
        assert time.monotonic() - begun < 3
        assert running.exception() is not None or running.result().status_code >= 500


def test_a_client_that_leaves_cancels_its_request(start: Start) -> None:
    served = start()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/slow", json={"number": 60}, timeout=0.5)
    served.wait_for("ended")
    assert served.end() == 0
    assert not [line for line in served.errors if "Traceback" in line]


def test_an_engine_that_can_never_be_opened_ends_the_server(start: Start) -> None:
    served = start(fails=True)
    assert served.process.wait(10) == 1
    served.wait(lambda: "penstock.errors.ModelError: no such model" in served.errors)


def test_a_port_in_use_is_told_before_anything_is_started(start: Start) -> None:
    first = start()
    second = start(port=first.port)
    assert second.process.wait(10) == 1
    second.wait(lambda: any("Address already in use; give another --port" in line for line in second.errors))
    assert "started" not in second.lines


def test_who_reads_nothing_is_left(start: Start) -> None:
    """Of a stream, of one long answer, and behind its end; who reads slowly is not."""
    served = start(write_timeout=1.0)
    head = b'POST /flood HTTP/1.1\r\nhost: a\r\ncontent-length: 11\r\n\r\n{"number":1}'.replace(b": 11", b": 12")
    flood, long, closing, slow = (socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(4))
    with flood, long, closing, slow:
        flood.sendall(head)
        long.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        closing.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        slow.sendall(head)
        end = time.monotonic() + 4
        while time.monotonic() < end:  # it takes a part of what is there now and again
            assert len(slow.recv(1 << 20)) > 0
            time.sleep(0.05)
        assert served.lines.count("left") == 1
        for each in (flood, long, closing):
            with contextlib.suppress(ConnectionError):
                assert len(read_all(each)) < 32 << 20, "it was cut off"
        assert len(slow.recv(1 << 20)) > 0
    assert served.end() == 0
    assert not [line for line in served.errors if "Traceback" in line]


def test_a_body_behind_its_answer_does_not_hold_the_connection(start: Start) -> None:
    served = start(head_seconds=0.7, api_keys=["sk-of-the-test"])
    head = b"POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), 10) as slow:
        slow.sendall(head)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
        end = time.monotonic() + 5
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                slow.sendall(b"1\r\nx\r\n")
                time.sleep(0.1)
        assert time.monotonic() < end, "it was closed"
    with socket.create_connection(("127.0.0.1", served.port), 10) as whole:  # one that ends goes on
        for _ in range(2):
            whole.sendall(head)
            answer = b""
            while b'"invalid_api_key"}}' not in answer:
                answer += whole.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 401 ")
            whole.sendall(b"1\r\nx\r\n0\r\n\r\n")
            time.sleep(0.9)
    assert served.end() == 0


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while piece := connection.recv(1 << 20):
        found += piece
    return found


HEAD = b"POST /echo HTTP/1.1\r\nhost: a\r\n"
RAW = [
    (b"nonsense\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000, 431),
    (b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 15_000, 431),
    (b"GET /" + b"x" * 100_000, 431),
    (HEAD + b"content-length: -1\r\n\r\n", 400),
    (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\nab", 400),
    (HEAD + b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n", 400),
    (HEAD + b"content-length: 99999999999999999999999\r\n\r\n", 400),
    (HEAD + b"content-length: 9999999999\r\nexpect: 100-continue\r\n\r\n", 413),
    (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    (HEAD + b"connection: close\r\ncontent-length: 13\r\n\r\n" + b'{"number": 1}', 200),
]


def test_raw_requests(start: Start) -> None:
    served = start()
    for data, status in RAW:
        answer = served.raw(data)
        assert answer.startswith(b"HTTP/1.1 %d " % status), (data[:60], answer[:200])
        assert len(answer) < 1500
    assert httpx.post(f"{served.url}/echo", json={"number": 1}).status_code == 200
    assert served.end() == 0


def test_too_large_a_body_gets_its_answer(start: Start) -> None:
    served = start(max_body_bytes=1_000_000)
    for _ in range(5):
        assert httpx.post(f"{served.url}/echo", content=b" " * 1_500_000).status_code == 413
    assert served.end() == 0


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*words.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_https(start: Start, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    served = start(ssl_certfile=str(cert), ssl_keyfile=str(key))
    context = ssl.create_default_context(cafile=str(cert))
    with httpx.Client(verify=context, base_url=served.url) as client:
        assert client.post("/echo", json={"number": 1}).json()["number"] == 1
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{served.port}/health")
    assert served.end() == 0


def test_a_key_of_another_certificate_is_told_at_once(start: Start, certificate: tuple[Path, Path]) -> None:
    served = start(ssl_certfile=str(certificate[0]), ssl_keyfile=str(certificate[0]))
    assert served.process.wait(10) == 1 and not served.lines
