"""The process that compiles: it stays small and single-threaded, and forks for each request.

A request may take any time and memory, or crash what compiles it; the fork has limits of its own, and its end is its
answer. Frames have their length in front; a request arrives on a socket of its own, which the control socket brings.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from penstock.errors import PenstockError, SamplingError
from penstock.grammar import schema
from penstock.grammar.vocabulary import Vocabulary, xgrammar

HEADER: Final = struct.Struct("<I")
DONE, REFUSED = b"+", b"-"
MOST_BYTES: Final = 16 << 20  # of a compiled grammar, written out: about 0.2 s to read
_TRIED: Final = 64  # random tokens that a compiled grammar is led through
_TRY_SECONDS: Final = 0.02  # CPU time that a mask may take on average, by trial
_MOST_SPACES: Final = 16  # and line ends, between two tokens of JSON
_WARNING: Final = re.compile(r"Warning: (.*)")
_SOURCE: Final = re.compile(r"\[[\d:]+\] \S+?:\d+: ")  # the library's own file and line, in front of what it says


def send(to: socket.socket, body: bytes) -> None:
    to.sendall(HEADER.pack(len(body)) + body)


def receive(source: socket.socket) -> bytes:
    """Raises EOFError where the other end has gone."""
    (size,) = HEADER.unpack(_exactly(source, HEADER.size))
    return _exactly(source, size)


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if not (part := source.recv(min(size - len(parts), 1 << 20))):
            raise EOFError
        parts += part
    return bytes(parts)


def write_vocabulary(vocabulary: Vocabulary) -> bytes:
    tokens = [each.decode("latin-1") for each in vocabulary.tokens]
    return json.dumps([tokens, vocabulary.size, vocabulary.stops]).encode()


def _read_vocabulary(body: bytes) -> Vocabulary:
    tokens, size, stops = json.loads(body)
    return Vocabulary(tuple(each.encode("latin-1") for each in tokens), size, tuple(stops))


def main(control: socket.socket) -> None:
    """Until the control socket closes."""
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads, but their locks
    try:
        info = _read_vocabulary(receive(control)).info()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever asked hears of a fork's end by its socket
        send(control, DONE)
        while True:
            _, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not fds:
                return
            with socket.socket(fileno=fds[0]) as asked:
                if os.fork() == 0:
                    control.close()
                    _answer(asked, info)
                    os._exit(0)
    except EOFError:
        return
    except SamplingError as error:
        send(control, REFUSED + str(error).encode())


def _answer(asked: socket.socket, info: Any) -> None:
    """In the fork, whose death by its limits is an answer too."""
    kind, text, seconds, memory = json.loads(receive(asked))
    os.nice(5)
    _limit(seconds, memory)
    try:
        send(asked, DONE + _compiled(kind, text, info))
    except PenstockError as error:
        send(asked, REFUSED + str(error).encode())
    except MemoryError:
        send(asked, REFUSED + f"it needs more than {memory >> 20} MiB to compile; make it smaller".encode())


def _limit(seconds: float, memory: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it, whatever runs
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _compiled(kind: str, text: str, info: Any) -> bytes:
    library = xgrammar()
    compiler = library.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)  # the library warns there of what it does not enforce
        try:
            grammar = _BUILD[kind](compiler, text)
        except RuntimeError as error:
            raise SamplingError(_plain(str(error))) from None
        said.seek(0)
        if warning := _WARNING.search(said.read().decode(errors="replace")):
            raise SamplingError(f"{warning[1]}; leave that out")
    written: bytes = grammar.serialize_json().encode()
    if len(written) > MOST_BYTES:
        raise SamplingError(f"compiled it has {len(written)} bytes, at most {MOST_BYTES}; make it smaller")
    _try(library.GrammarMatcher(grammar), info.vocab_size)
    return written


def _plain(message: str) -> str:
    """What the library says, without its own source's names."""
    return _SOURCE.sub("", message).strip().split("\n")[0][:300]


def _json(compiler: Any, text: str) -> Any:
    """Members may come on lines of their own; without a bound a weak model writes spaces until its limit."""
    return compiler.compile_json_schema(text, any_whitespace=True, max_whitespace_cnt=_MOST_SPACES)


_BUILD: Final[dict[str, Any]] = {
    "json": lambda compiler, text: _json(compiler, schema.checked(text)),
    "json_object": lambda compiler, _: _json(compiler, '{"type": "object"}'),
    "regex": lambda compiler, text: compiler.compile_regex(text),
    "grammar": lambda compiler, text: compiler.compile_grammar(text),
    "structural_tag": lambda compiler, text: compiler.compile_structural_tag(schema.checked_tag(text)),
    "choice": lambda compiler, text: compiler.compile_grammar(
        "root ::= " + " | ".join(_literal(each) for each in json.loads(text))
    ),
}


def _literal(text: str) -> str:
    """A text in GBNF: what is not plain ASCII by its number."""
    plain = (c if (c.isascii() and c.isalnum()) or c == " " else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def _try(matcher: Any, size: int) -> None:
    """Lead it through random tokens. Raises SamplingError where none is allowed, or masks take long."""
    import numpy as np

    draw, mask = random.Random(0), np.zeros((1, -(-size // 32)), np.int32)
    start, count = time.thread_time(), 0
    for count in range(1, _TRIED + 1):
        matcher.fill_next_token_bitmask(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if not len(allowed):
            raise SamplingError(f"no text fulfils it: behind {count - 1} tokens none is allowed; correct it")
        matcher.accept_token(int(draw.choice(allowed)))
        if matcher.is_terminated():
            break
    if (took := (time.thread_time() - start) / count) > _TRY_SECONDS:
        raise SamplingError(f"each token takes {took * 1e3:.0f} ms to check, at most {_TRY_SECONDS * 1e3:.0f} ms")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
