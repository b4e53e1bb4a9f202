"""Compiling grammars for the HTTP process: in processes of their own, so nothing asked for can hold others up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from penstock.errors import QueueFullError
from penstock.grammar import GuidedDecoding
from penstock.grammar.process import Compiler
from penstock.grammar.vocabulary import vocabulary_of
from penstock.text import Tokenizer

PROCESSES: Final = 2
MOST_WAITING: Final = 64


class GrammarClient:
    """Compiles for one engine. `compile` may be called any number of times at once; `close` at the end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int], seconds: float = 5.0) -> None:
        """vocab_size, eos: of the engine's `facts`. seconds: what one grammar may take."""
        ...

    async def compile(self, guided: GuidedDecoding) -> bytes:
        """What `Submit.grammar` carries. Raises SamplingError where it cannot be compiled, or not in time and memory;
        QueueFullError where too many wait already."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the processes."""
