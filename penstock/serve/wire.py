"""What the HTTP process and the engine process say to each other: typed msgpack, one message a frame, never pickle.

Token ids alone cross: text, templates and stop strings belong to the HTTP process. Times are seconds on the machine's
monotonic clock, which both read.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from penstock.errors import PenstockError

MOST_BYTES: Final = 256 << 20  # of a frame; larger ones end the connection
HEADER: Final = struct.Struct("<I")  # the length of what follows


class Submit(Struct, tag="submit", array_like=True, frozen=True):
    """A request. `params`: the fields of SamplingParams that differ from their defaults, without `stop` and
    `detokenize`, which are not the engine's. `grammar`: the key of one that the engine knows. `embed`: give
    the prompt's vector instead of tokens. The rest as `runtime.intake.Submission`."""

    id: str
    prompt: list[int]
    params: dict[str, Any] = field(default_factory=dict)
    arrival: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    queue_timeout: float | None = None
    timeout: float | None = None
    grammar: bytes | None = None
    embed: bool = False


class Learn(Struct, tag="learn", array_like=True, frozen=True):
    """A grammar that requests behind this may name by its key. `body`: as the grammar process made it."""

    body: bytes


class Forget(Struct, tag="forget", array_like=True, frozen=True):
    """No request behind this names that grammar."""

    key: bytes


class Abort(Struct, tag="abort", array_like=True, frozen=True):
    """End a request, or one of its texts, now. Unknown ones have ended already; no Part follows."""

    id: str
    index: int | None = None


class Stop(Struct, tag="stop", array_like=True, frozen=True):
    """End the engine process; what still runs ends with an error."""


class Progress(Struct, tag="progress", array_like=True, frozen=True):
    """Of building and opening; `total` 0: unknown."""

    stage: str
    done: int
    total: int


class Ready(Struct, tag="ready", array_like=True, frozen=True):
    """The engine takes requests. `facts`: see `engine.facts`."""

    facts: dict[str, Any]


class Times(Struct, array_like=True, frozen=True):
    """As `runtime.requests.RequestMetrics`."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    admitted: float | None = None
    reused_tokens: int = 0
    preemptions: int = 0


class Part(Struct, array_like=True, frozen=True):
    """New tokens of a request's text `index`; behind `finish` nothing follows for that text.

    finish: "stop", "length", "timeout", "abort". stop_token: the id among stop_token_ids that ended it, if one did.
    ended_by_token: whether the last token ended the text and so has none of its own. logprobs: of each new token,
    {token id: log-probability}, itself first, where they were asked for, or best_of needs them. prompt_logprobs: once,
    where asked for. score, cumulative: of a beam search's texts, which come whole. vector: of an embedding. times: at
    the first part of a text, as far as they are known, and at its end. notes: the sampling parameters that were left
    open, at the first part.
    """

    id: str
    index: int
    tokens: list[int]
    finish: str | None = None
    stop_token: int | None = None
    ended_by_token: bool = False
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    score: float | None = None
    vector: bytes | None = None  # f32, little endian
    times: Times | None = None
    notes: list[str] = field(default_factory=list)
    cumulative: float | None = None


class Parts(Struct, tag="parts", array_like=True, frozen=True):
    """All that came since the last frame, in order."""

    parts: list[Part]


class Failed(Struct, tag="failed", array_like=True, frozen=True):
    """A request ended with an error, whole. `kind`: the name of a class of `penstock.errors`."""

    id: str
    kind: str
    message: str


class Beat(Struct, tag="beat", array_like=True, frozen=True):
    """Some times a second, from a thread that does not wait for steps.

    time: when it was written. steps: read since the start. stepped: when the last one was read, or work came to an idle
    engine. busy: whether there is work. stats: what `LLM.stats` gives, the newest that is known; empty at first.
    """

    time: float
    steps: int
    stepped: float
    busy: bool
    stats: dict[str, Any]


ToEngine = Submit | Learn | Forget | Abort | Stop
FromEngine = Progress | Ready | Parts | Failed | Beat

_ENCODER: Final = msgspec.msgpack.Encoder()
_TO_ENGINE: Final[msgspec.msgpack.Decoder[ToEngine]] = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE: Final[msgspec.msgpack.Decoder[FromEngine]] = msgspec.msgpack.Decoder(FromEngine)


class WireError(PenstockError):
    """The other process said what is no message."""


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message with its length in front. Raises WireError where it is too long."""
    body = _ENCODER.encode(message)
    if len(body) > MOST_BYTES:
        raise WireError(f"a message of {len(body)} bytes, at most {MOST_BYTES}; send a shorter prompt")
    return HEADER.pack(len(body)) + body


def length_at(buffer: bytes | bytearray | memoryview, at: int = 0) -> int:
    """Bytes of the message whose length stands there. Raises WireError."""
    length: int = HEADER.unpack_from(buffer, at)[0] if len(buffer) - at >= HEADER.size else 0
    if not 0 < length <= MOST_BYTES:
        raise WireError(f"a message of {length} bytes cannot be; they have 1 to {MOST_BYTES}")
    return length


def read_to_engine(body: bytes | bytearray | memoryview) -> ToEngine:
    """Raises WireError."""
    try:
        return _TO_ENGINE.decode(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message to the engine: {error}") from error


def read_from_engine(body: bytes | bytearray | memoryview) -> FromEngine:
    """Raises WireError."""
    try:
        return _FROM_ENGINE.decode(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"not a message of the engine: {error}") from error
