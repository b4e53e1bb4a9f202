"""A process that speaks as the engine process does, and generates nothing: words that say when each was written.

It is for the load on the HTTP process alone: a token of every running request in each step, whatever their number.
`python -m tests.cpu.serve.simulated STEP_SECONDS`; what else it needs comes as the engine process gets it.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from typing import cast

from penstock import bundled
from penstock.serve.wire import (
    HEADER,
    Abort,
    Beat,
    FromEngine,
    Part,
    Parts,
    Ready,
    Stop,
    Submit,
    Times,
    frame,
    read_to_engine,
)

CODES = 2048  # words, each of which stands for a number
MOST_TOKENS = 1 << 16  # of a request
BEAT = 0.25
BEHIND = 5  # steps that may follow each other without a pause


@cache
def words() -> dict[str, int]:
    """The first CODES words of letters that the bundled tokenizer has with a space before, and their token ids."""
    vocabulary = json.loads((bundled.target() / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    found = {k[1:]: v for k, v in vocabulary.items() if k[0] == "Ġ" and k[1:].isascii() and k[1:].isalpha()}
    return dict(sorted(found.items(), key=lambda item: item[1])[:CODES])


class Clock:
    """Times as words: a request's first two are the time in milliseconds, low digit first, each further one the low
    digit alone. A reader that has the one before finds the time of the next, if they are less than two seconds apart.
    """

    def __init__(self) -> None:
        self.tokens = list(words().values())
        self.codes = {word.encode(): code for code, word in enumerate(words())}

    def begin(self, now: float) -> list[int]:
        high, low = divmod(int(now * 1e3), CODES)
        return [self.tokens[low], self.tokens[high % CODES]]

    def go_on(self, now: float) -> int:
        return self.tokens[int(now * 1e3) % CODES]

    @staticmethod
    def read_begin(low: int, high: int, now: float) -> int:
        """Milliseconds, of the last time before `now` that reads so."""
        at, whole = high * CODES + low, CODES * CODES
        return at + (int(now * 1e3) - at) // whole * whole

    @staticmethod
    def read_on(before: int, low: int) -> int:
        return before + (low - before) % CODES


@dataclass(slots=True)
class Running:
    id: str
    index: int
    left: int
    arrival: float
    begun: float = 0.0
    unsent: list[int] = field(default_factory=list)


class Engine(asyncio.Protocol):
    """One connection. Where the other side reads slowly, tokens wait, and go as one part of their request."""

    def __init__(self, step: float) -> None:
        self.step, self.clock = step, Clock()
        self.running: dict[tuple[str, int], Running] = {}
        self.open, self.steps, self.rest, self.aborted = True, 0, b"", 0
        self.over = asyncio.get_running_loop().create_future()

    # --- the socket ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        transport.set_write_buffer_limits(high=64 << 10)

    def pause_writing(self) -> None:
        self.open = False

    def resume_writing(self) -> None:
        self.open = True

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while len(self.rest) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self.rest)[0]
            if len(self.rest) < end:
                return
            body, self.rest = self.rest[HEADER.size : end], self.rest[end:]
            self.take(body)

    def send(self, message: FromEngine) -> None:
        self.transport.write(frame(message))

    # --- the engine ---

    def take(self, body: bytes) -> None:
        match read_to_engine(body):
            case Submit() as new:
                for index in range(new.params.get("n", 1)):
                    left = new.params.get("max_tokens", 16)
                    self.running[new.id, index] = Running(new.id, index, left, new.arrival)
            case Abort(id, index):
                gone = [key for key in self.running if key[0] == id and index in (None, key[1])]
                self.aborted += len(gone)
                for key in gone:
                    del self.running[key]
            case Stop():
                self.transport.abort()  # with what nobody reads

    def ready(self) -> None:
        config = json.loads((bundled.target() / "config.json").read_text("utf-8"))
        self.send(
            Ready({
                "model": "simulated", "directory": str(bundled.target()), "vocab_size": config["vocab_size"],
                "max_seq_len": MOST_TOKENS, "max_batch_size": 4096, "max_num_tokens": MOST_TOKENS, "eos": [],
                "generation": {}, "dtype": "f32", "device": "simulated", "version": "0", "embeds": False,
            })
        )  # fmt: skip

    async def run(self) -> None:
        """Steps at their times, and beats, until the connection ends."""
        self.ready()
        loop, due, beat = asyncio.get_running_loop(), time.monotonic(), 0.0
        while not self.over.done():
            now = time.monotonic()
            self.generate(now)
            if self.open:
                self.write()
            if now >= beat:
                beat = now + BEAT
                stats = {"requests_running": len({id for id, _ in self.running}), "aborted": self.aborted}
                self.send(Beat(now, self.steps, now, bool(self.running), stats))
            due = max(due + self.step, time.monotonic() - BEHIND * self.step)  # what it was late is made up for
            await asyncio.wait([self.over], timeout=max(0.0, due - loop.time()))

    def generate(self, now: float) -> None:
        """A token each; of those that are new two, which say the time in full."""
        self.steps += 1
        low = self.clock.go_on(now)
        for each in self.running.values():
            if each.left > 0:
                new = [low] if each.begun else self.clock.begin(now)
                each.begun = each.begun or now
                each.unsent += new
                each.left -= len(new)

    def write(self) -> None:
        parts, now = [], time.monotonic()
        for key, each in list(self.running.items()):
            if not each.unsent:
                continue
            done = each.left <= 0
            times = Times(each.arrival, each.begun, now, each.begun) if done else None
            parts.append(Part(each.id, each.index, each.unsent, "length" if done else None, times=times))
            each.unsent = []
            if done:
                del self.running[key]
        if parts:
            self.send(Parts(parts))


async def main(path: str, step: float) -> None:
    loop = asyncio.get_running_loop()
    _, engine = await loop.create_unix_connection(lambda: Engine(step), path)
    await engine.run()


if __name__ == "__main__":
    assert math.isfinite(float(sys.argv[1]))
    asyncio.run(main(json.load(sys.stdin)["socket"], float(sys.argv[1])))
