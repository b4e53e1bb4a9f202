"""What the engine process is told before it connects: JSON on its standard input, for arguments can be seen by all."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field


class Opening(Struct, frozen=True, forbid_unknown_fields=True):
    """socket: where its parent listens. faults: a file for stacks, when it dies or is sent SIGUSR1. box: the file of
    `blackbox`. arguments: of LLM."""

    socket: str
    faults: str
    box: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


def read_opening(text: bytes) -> Opening:
    """Raises msgspec.MsgspecError."""
    return msgspec.json.decode(text, type=Opening)
