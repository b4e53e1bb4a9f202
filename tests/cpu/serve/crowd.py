"""Many clients in one cheap loop: raw sockets, events looked through for words, each word's time compared with now."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop

from penstock.bench.workload import percentile
from tests.cpu.serve.simulated import Clock

ROOT = Path(__file__).resolve().parents[3]
RAMP = 0.25  # of a run, in which its streams begin
_TEXT = re.compile(rb'"text":"([^"]*)"')
DONE = b"data: [DONE]"


@dataclass
class Crowd:
    """What all its streams saw. latencies: milliseconds from a token's writing to its receipt, and when it came."""

    clock: Clock = field(default_factory=Clock)
    latencies: array[float] = field(default_factory=lambda: array("f"))
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: int = 0
    chunks: int = 0
    reads: int = 0
    broken: list[str] = field(default_factory=list)
    first_end: float = float("inf")  # of a stream

    def p(self, q: float, since: float = 0.0, until: float = float("inf")) -> float:
        """A percentile, of tokens that came in that time."""
        return percentile([x for x, at in zip(self.latencies, self.times, strict=True) if since <= at < until], q)

    def rate(self, since: float, until: float) -> float:
        """Tokens a second that came in that time."""
        return sum(since <= at < until for at in self.times) / (until - since)


class Stream(asyncio.Protocol):
    """One streamed completion."""

    def __init__(self, crowd: Crowd, request: bytes) -> None:
        self.crowd, self.request = crowd, request
        self.rest, self.low, self.at = b"", -1, -1
        self.tokens, self.status = 0, b""
        self.over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now, crowd = time.monotonic(), self.crowd
        whole, mark, self.rest = (self.rest + data).rpartition(b"\n\n")
        if not self.status and mark:
            self.status = whole[:12]
        crowd.reads += 1
        for text in _TEXT.findall(whole):
            crowd.chunks += 1
            for word in text.split():
                self._take(crowd.clock.codes[word], now)
        if DONE in whole:
            self.end(True)

    def _take(self, code: int, now: float) -> None:
        self.tokens += 1
        self.crowd.tokens += 1
        if self.low < 0:
            self.low = code
            return
        self.at = Clock.read_on(self.at, code) if self.at >= 0 else Clock.read_begin(self.low, code, now)
        self.crowd.latencies.append(now * 1e3 - self.at)
        self.crowd.times.append(now)

    def connection_lost(self, error: Exception | None) -> None:
        self.end(False)

    def end(self, good: bool) -> None:
        if not self.over.done():
            self.crowd.first_end = min(self.crowd.first_end, time.monotonic())
            if not good:
                self.crowd.broken.append(f"{self.status!r} {self.rest[-200:]!r} after {self.tokens} tokens")
            self.over.set_result(good)
            self.transport.close()


def request(tokens: int, prompt: object = (5, 6, 7), **more: object) -> bytes:
    data = {"model": "simulated", "prompt": prompt, "max_tokens": tokens, "stream": True, **more}
    body = json.dumps(data).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def stream(crowd: Crowd, port: int, tokens: int) -> Stream:
    """To its end."""
    loop, text = asyncio.get_running_loop(), request(tokens)
    _, it = await loop.create_connection(lambda: Stream(crowd, text), "127.0.0.1", port)
    await it.over
    return it


async def streams(port: int, count: int, tokens: int, spread: float = 0.0) -> Crowd:
    """So many at once; their starts over `spread` seconds."""
    crowd = Crowd()

    async def one(i: int) -> Stream:
        await asyncio.sleep(spread * i / count)
        return await stream(crowd, port, tokens)

    await asyncio.gather(*(one(i) for i in range(count)))
    return crowd


def silent(port: int, tokens: int, **more: object) -> socket.socket:
    """A client that asks and does not read."""
    it = socket.socket()
    it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    it.connect(("127.0.0.1", port))
    it.sendall(request(tokens, **more))
    return it


class Server:
    """`load_server` in a process of its own. A context manager."""

    def __init__(self, step: float) -> None:
        command = [sys.executable, "-m", "tests.cpu.serve.load_server", str(step)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)

    def __enter__(self) -> Server:
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            assert self._process.wait(20) == 0
        finally:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    @property
    def cpu(self) -> float:
        """Seconds that it has run, in all."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
            return dict(json.loads(answer.read()))


def load(step: float, count: int, tokens: int) -> dict[str, Any]:
    """A crowd at a server of its own, and what it saw. Rate and latencies are of the time in which all streams run."""
    with Server(step) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(streams(server.port, 5, 20))  # what is made at a first request is made
        before, start, own = server.cpu, time.monotonic(), time.process_time()
        gc.disable()  # a pause of this process would count as the server's
        try:
            crowd = loop.run(streams(server.port, count, tokens))
        finally:
            gc.enable()
        seconds = time.monotonic() - start
        first, last = start + RAMP * seconds, crowd.first_end  # the time in which all of them run
        middle = (first + last) / 2
        assert not crowd.broken, crowd.broken[:3]
        assert crowd.tokens == count * tokens
        return {
            "streams": count, "step_seconds": step, "wanted_tokens_per_s": round(count / step),
            "tokens_per_s": crowd.rate(first, last), "seconds": seconds, "tokens": crowd.tokens,
            "tokens_per_chunk": crowd.tokens / crowd.chunks,
            "added_latency_ms": {f"p{q}": crowd.p(q, first, last) for q in (50, 90, 99, 100)},
            "p99_ms_first_half": crowd.p(99, first, middle), "p99_ms_second_half": crowd.p(99, middle, last),
            "server_cpu_share": (server.cpu - before) / seconds,
            "server_us_per_chunk": 1e6 * (server.cpu - before) / crowd.chunks,
            "client_cpu_share": (time.process_time() - own) / seconds, "server_resident": server.resident,
            "load_average": os.getloadavg()[0], "cores": os.cpu_count(),
        }  # fmt: skip
