"""What a request's slot holds for `ir.ops.control`: penalties, biases, bans, and what log-probabilities it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.errors import SamplingError
from penstock.ir.ops.control import HEADER
from penstock.ir.ops.state import CONTROLS

ROOM = CONTROLS - len(HEADER)  # numbers for lists


@dataclass(frozen=True)
class Controls:
    """All off by default. `ends`: tokens banned while fewer than `least_length` are known; `bias`: (token, bias) pairs;
    `bad_words`: token sequences; `num_logprobs`: 0 for none, n + 1 for the chosen token's and the top n.
    """

    prompt_length: int
    least_length: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    ends: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_logprobs: int = 0
    by_adjusted: bool = False

    @property
    def adjusts(self) -> bool:
        """Whether any logit changes."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        late = self.least_length > self.prompt_length and self.ends
        return bool(penalties or late or self.no_repeat_ngram_size or self.bias or self.bad_words)

    @property
    def needed(self) -> bool:
        """Whether a step with this request is a controlled one."""
        return self.adjusts or self.num_logprobs > 0

    def numbers(self) -> NDArray[np.int32]:
        """As the slot holds them. Raises SamplingError where the lists are too long."""
        words = [number for word in self.bad_words for number in (len(word), *word)]
        facts = {
            "prompt_length": self.prompt_length, "least_length": self.least_length,
            "no_repeat_ngram_size": self.no_repeat_ngram_size, "num_ends": len(self.ends),
            "num_bias": len(self.bias), "num_bad": len(words), "adjusts": self.adjusts,
            "num_logprobs": self.num_logprobs, "by_adjusted": self.by_adjusted,
        }  # fmt: skip
        header = np.array([facts.get(name, 0) for name in HEADER], np.int32)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            header.view(np.float32)[HEADER.index(name)] = getattr(self, name)
        biases = np.array([bias for _, bias in self.bias], np.float32).view(np.int32)
        pairs = np.stack([np.array([token for token, _ in self.bias], np.int32), biases], 1).ravel()
        lists = np.concatenate([np.array(self.ends, np.int32), pairs, np.array(words, np.int32)])
        if len(lists) > ROOM:
            raise SamplingError(
                f"logit_bias has {len(self.bias)} tokens, bad_words {len(self.bad_words)} spellings of {len(words)} "
                f"numbers in all, and {len(self.ends)} tokens end the text: that takes {len(lists)} numbers, and a "
                f"request has room for {ROOM} (2 for each bias); give fewer"
            )
        return np.concatenate([header, lists])
