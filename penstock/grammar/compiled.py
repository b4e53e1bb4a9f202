"""A grammar as the process that compiles made it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Compiled:
    """Megabytes for a large vocabulary, so that who has it once is told its `key` from then on."""

    body: bytes = field(repr=False)
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", hashlib.sha256(self.body).digest())
