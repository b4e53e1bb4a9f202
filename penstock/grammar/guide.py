"""Where a text stands in its grammar: which tokens may come next, as the bits of a mask."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.errors import SamplingError
from penstock.grammar.compiled import Compiled
from penstock.grammar.vocabulary import Vocabulary, xgrammar

KEPT: Final = 64  # compiled grammars, each of at most `worker.MOST_BYTES` written out
FIRST_SECONDS: Final = 0.25  # CPU time that masks of a text may take in any case
EACH_SECONDS: Final = 0.01  # and beyond that for each of its tokens
MOST_THREADS: Final = 8
KEEP: Final = 0.9  # of what a mask may take, from one to the next: dear and cheap ones come in turn
SHARE: Final = 0.0005  # seconds of masks that are worth another thread: less than that goes into waking it
Bits = npt.NDArray[np.int32]
Asked = tuple["Guide", Sequence[int], Sequence[int]]  # and the arguments of `Guide.fill`


class Grammars:
    """Reads what `process.Compiler` made, for one engine. Any thread may use it."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is asked once, by the first grammar."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._info: Any = None
        self._kept: OrderedDict[bytes, _Read] = OrderedDict()

    def guide(self, compiled: Compiled) -> Guide:
        """A fresh one, at the beginning. Raises SamplingError where the grammar is none of this engine's."""
        with self._lock:
            key = compiled.key
            if key not in self._kept:
                self._kept[key] = _Read(self._read(compiled.body))
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            read = self._kept[key]
            return Guide(xgrammar().GrammarMatcher(read.grammar), read)

    def warm(self) -> None:
        """What the first grammar takes seconds for. Raises SamplingError where there can be none."""
        info = self._vocabulary().info()
        with self._lock:
            self._info = self._info or info

    def _read(self, compiled: bytes) -> Any:
        library = xgrammar()
        if self._info is None:
            self._info = self._vocabulary().info()
        try:
            return library.CompiledGrammar.deserialize_json(compiled.decode(), self._info)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise SamplingError(f"the grammar was not compiled for this engine: {error}; compile it anew") from error


@dataclass(eq=False)
class _Read:
    """A grammar as the library has it. `dearest`: seconds of the mask of all its texts that took longest."""

    grammar: Any
    dearest: float = 0.0


class Filler:
    """Writes the masks of a step, on several threads where they take long: the library works outside Python's lock."""

    def __init__(self) -> None:
        self._count = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._threads: ThreadPoolExecutor | None = None

    def fill(self, asked: Sequence[Asked], mask: Bits) -> list[Exception | None]:
        """Row by row of the mask; what was raised for each, whose mask is anything then."""
        expected = sum(guide.may_take for guide, _, _ in asked)
        count, found = min(self._count, len(asked), int(expected / SHARE)), dict[int, Exception | None]()
        if count < 2:
            return [_filled(each, mask, row) for row, each in enumerate(asked)]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._count, "masks")
        parts = [range(first, len(asked), count) for first in range(count)]
        work = self._threads.map(lambda rows: [(row, _filled(asked[row], mask, row)) for row in rows], parts)
        for part in work:
            found |= dict(part)
        return [found[row] for row in range(len(asked))]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()


def _filled(asked: Asked, mask: Bits, row: int) -> Exception | None:
    guide, tokens, ahead = asked
    try:
        guide.fill(tokens, ahead, mask, row)
    except Exception as error:  # the request's border
        mask[row] = -1
        return error
    return None


class Guide:
    """Of one text. Tokens that a text loses, since it is computed anew, are taken back. `may_take`: seconds of its next
    mask, by its dearest so far, which is forgotten little by little; of a fresh one by its grammar's."""

    def __init__(self, matcher: Any, read: _Read) -> None:
        self._matcher, self._read = matcher, read
        self._text: Sequence[int] = ()  # whose tokens these are
        self._tokens: list[int] = []
        self._seconds, self.may_take = 0.0, read.dearest

    def fill(self, text: Sequence[int], ahead: Sequence[int], mask: Bits, row: int) -> None:
        """Write into that row of the mask what may come behind these tokens: anything where the text is over. `text`:
        the same list from one time to the next, unless it loses tokens; `ahead`: what it will have got next.

        Raises SamplingError where the tokens are not of the grammar, or it takes too much time.
        """
        start = time.thread_time()
        self._follow(text, ahead)
        if self._matcher.is_terminated():
            mask[row] = -1
        else:
            self._matcher.fill_next_token_bitmask(mask, row)
        took = time.thread_time() - start
        self._seconds += took
        self._read.dearest = max(self._read.dearest, took)
        self.may_take = max(took, KEEP * self.may_take)
        if self._seconds > FIRST_SECONDS + EACH_SECONDS * len(self._tokens):
            raise SamplingError(
                f"guided_decoding: checking {len(self._tokens)} tokens took {self._seconds:.2f} s, at most "
                f"{FIRST_SECONDS} s and {EACH_SECONDS} s for each; give a simpler grammar"
            )

    def _follow(self, text: Sequence[int], ahead: Sequence[int]) -> None:
        known = len(self._tokens)
        if text is not self._text or len(text) + len(ahead) < known:  # rare: no step may look through long texts
            self._text, tokens = text, [*text, *ahead]
            pairs = enumerate(zip(self._tokens, tokens, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(known, len(tokens)))
            if known > same:
                self._matcher.rollback(known - same)
                del self._tokens[same:]
                known = same
        for token in (*text[known:], *ahead[max(0, known - len(text)) :]):
            if not self._matcher.accept_token(token):
                raise SamplingError(
                    f"guided_decoding: token {token}, the text's {len(self._tokens) + 1}th, is not of the grammar: "
                    f"bad_words, no_repeat_ngram_size or logits_processors left none that is; leave them out"
                )
            self._tokens.append(token)
