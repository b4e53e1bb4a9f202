"""The text of one growing sequence of tokens, up to its stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from penstock.text.detokenize import IncrementalDetokenizer, StopStrings
from penstock.text.tokenizer import Tokenizer


class Growth:
    """Text as it becomes certain. Stop strings count from token `min_tokens` on; `include`: the stop string too."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), *, stops: Sequence[str] = (), include: bool = False,
        min_tokens: int = 0, skip_special_tokens: bool = True, shown: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._text = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens, shown=shown)
        self._stops = StopStrings(stops, include=include) if stops else None
        self._early = min_tokens - 1  # tokens whose text holds no stop string
        self.certain = 0  # characters, of stop strings and what is behind them too

    @property
    def matched(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.matched if self._stops else None

    def add(self, token: int, silent: bool = False) -> str:
        """Further text. `silent`: the token ends the sequence and has no text."""
        self._early -= 1
        if silent:
            return ""
        new = self._text.add(token)
        self.certain += len(new)
        return new if self._stops is None or self._early >= 0 else self._stops.add(new)

    def end(self) -> str:
        """No token follows: what was held back."""
        if self._stops is None:
            return self._text.finish()
        return "" if self._stops.matched is not None else self._stops.add(self._text.finish()) + self._stops.finish()
