"""Where a text stands in its grammar: which tokens may come next, as the bits of a mask."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from penstock.errors import SamplingError
from penstock.grammar.vocabulary import Vocabulary, xgrammar

KEPT: Final = 64  # compiled grammars, each of at most `worker.MOST_BYTES` written out
FIRST_SECONDS: Final = 0.25  # CPU time that masks of a text may take in any case
EACH_SECONDS: Final = 0.01  # and beyond that for each of its tokens
Bits = npt.NDArray[np.int32]


class Grammars:
    """Reads what `process.Compiler` made, for one engine. Any thread may use it."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        """`vocabulary` is asked once, by the first grammar."""
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._info: Any = None
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def guide(self, compiled: bytes) -> Guide:
        """A fresh one, at the beginning. Raises SamplingError where the bytes are none of this engine's."""
        with self._lock:
            key = hashlib.sha256(compiled).digest()
            if key not in self._kept:
                self._kept[key] = self._read(compiled)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return Guide(xgrammar().GrammarMatcher(self._kept[key]))

    def _read(self, compiled: bytes) -> Any:
        library = xgrammar()
        if self._info is None:
            self._info = self._vocabulary().info()
        try:
            return library.CompiledGrammar.deserialize_json(compiled.decode(), self._info)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise SamplingError(f"the grammar was not compiled for this engine: {error}; compile it anew") from error


class Guide:
    """Of one text. Tokens that a text loses, since it is computed anew, are taken back."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._tokens: list[int] = []
        self._seconds = 0.0

    def fill(self, tokens: Sequence[int], mask: Bits, row: int) -> bool:
        """Write into that row of the mask what may come behind these tokens of the text; False: anything, for the text
        is over. Raises SamplingError where the tokens are not of the grammar, or it takes too much time."""
        start = time.thread_time()
        self._follow(tokens)
        over = self._matcher.is_terminated()
        if not over:
            self._matcher.fill_next_token_bitmask(mask, row)
        self._seconds += time.thread_time() - start
        if self._seconds > FIRST_SECONDS + EACH_SECONDS * len(tokens):
            raise SamplingError(
                f"guided_decoding: checking {len(tokens)} tokens took {self._seconds:.2f} s, at most "
                f"{FIRST_SECONDS} s and {EACH_SECONDS} s for each; give a simpler grammar"
            )
        return not over

    def _follow(self, tokens: Sequence[int]) -> None:
        same = next((i for i, (a, b) in enumerate(zip(self._tokens, tokens, strict=False)) if a != b), None)
        same = min(len(self._tokens), len(tokens)) if same is None else same
        if back := len(self._tokens) - same:
            self._matcher.rollback(back)
            del self._tokens[same:]
        for token in tokens[same:]:
            if not self._matcher.accept_token(token):
                raise SamplingError(
                    f"guided_decoding: token {token}, the text's {len(self._tokens) + 1}th, is not of the grammar: "
                    f"bad_words, no_repeat_ngram_size or logits_processors left none that is; leave them out"
                )
            self._tokens.append(token)
