"""A server of our own, started for a benchmark and ended behind it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Final

from penstock.bench.serve.drive import ServerError

MAIN: Final = "from penstock.cli import main; raise SystemExit(main())"
PATIENCE: Final = 60.0  # seconds to end, with nothing running


@contextmanager
def served(words: Sequence[str], patience: float) -> Iterator[str]:
    """`penstock serve WORDS` on a free port; its URL, once /health says 200 and warm.

    Raises ServerError where it ends, or is not ready in `patience` seconds; its last words are in the message.
    """
    url = f"http://127.0.0.1:{(port := _free_port())}"
    command = [sys.executable, "-c", MAIN, "serve", *words, "--port", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            _until_ready(process, url, time.monotonic() + patience, said)
            yield url
        finally:
            _end(process)


def _until_ready(process: subprocess.Popen[bytes], url: str, end: float, said: IO[bytes]) -> None:
    while not _healthy(url):
        if process.poll() is not None:
            raise ServerError(f"penstock serve ended with {process.returncode}: {_tail(said)}")
        if time.monotonic() > end:
            raise ServerError(f"penstock serve was not ready in time; raise --ready_timeout. It said: {_tail(said)}")
        time.sleep(0.1)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200 and json.load(answer)["warm"])
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines()
    return " / ".join(line.strip() for line in lines[-5:] if line.strip())[-1000:] or "nothing"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
