"""Compiling grammars for the HTTP process: in processes of their own, so nothing asked for can hold others up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from penstock.grammar import GuidedDecoding
from penstock.grammar.compiled import Compiled
from penstock.grammar.process import AT_ONCE, MOST_WAITING, SECONDS, Compiler
from penstock.grammar.vocabulary import vocabulary_of
from penstock.text import Tokenizer


class GrammarClient:
    """Compiles for one engine. `compile` may be asked any number of times at once; `close` at the end."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos: Sequence[int], seconds: float = SECONDS
    ) -> None:
        """vocab_size, eos: of the engine's `facts`. seconds: what one grammar may take. Nothing is started yet."""
        self._compiler = Compiler(lambda: vocabulary_of(tokenizer, vocab_size, eos), seconds)
        # A thread waits on each; one that waits for its turn costs nothing else.
        self._threads = ThreadPoolExecutor(AT_ONCE + MOST_WAITING + 1, "grammar")

    async def compile(self, guided: GuidedDecoding) -> Compiled:
        """For `link.submit`. Raises SamplingError where it cannot be compiled, or not within time and
        memory; QueueFullError where too many wait already."""
        found = self._compiler.cached(guided)
        if found is None:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._compiler.compile, guided)
        return found

    def close(self) -> None:
        """End the process; whoever still waits gets an error."""
        self._compiler.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
