"""From the engine's tokens to texts: detokenised, cut at stop strings, the best of several."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final, NamedTuple

from penstock.errors import ExecutorError
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.errors import too_late
from penstock.serve.link import Reply
from penstock.serve.serving import Watcher
from penstock.serve.wire import Part
from penstock.text import Tokenizer
from penstock.text.growth import Growth

_NOT_SENT: Final = ("stop", "detokenize", "guided_decoding", "logits_processors")
_DEFAULTS: Final = {
    each.name: getattr(SamplingParams(), each.name) for each in fields(SamplingParams) if each.name not in _NOT_SENT
}


def wire_params(params: SamplingParams) -> dict[str, Any]:
    """As `wire.Submit` has them."""
    return {name: value for name, default in _DEFAULTS.items() if (value := getattr(params, name)) != default}


class Scored(NamedTuple):
    """A token with the log-probabilities that it was sampled from, itself first. offset: characters of text before."""

    token: int
    scores: Mapping[int, float]
    offset: int


class Text:
    """One text as it grows. `new`, `scored`: since the last `read`. finish: as OpenAI's, "stop" or "length"."""

    __slots__ = (
        "_growth",
        "engine_finish",
        "finish",
        "index",
        "likelihood",
        "new",
        "num_tokens",
        "scored",
        "stop_reason",
    )

    def __init__(self, index: int, growth: Growth) -> None:
        self.index, self._growth = index, growth
        self.new, self.scored = "", list[Scored]()
        self.num_tokens, self.likelihood = 0, 0.0
        self.finish: str | None = None
        self.stop_reason: str | int | None = None

    def take(self, part: Part) -> None:
        """Tokens behind a stop string do not count."""
        tokens, growth = part.tokens, self._growth
        last = len(tokens) - 1 if part.ended_by_token else -1
        for i, token in enumerate(tokens):
            if part.logprobs is not None:
                scores = part.logprobs[i]
                self.likelihood += scores.get(token, 0.0)
                self.scored.append(Scored(token, scores, growth.certain))
            self.num_tokens += 1
            self.new += growth.add(token, i == last)
            if growth.matched is not None:
                break
        if part.finish is not None:
            self.new += growth.end()
        if growth.matched is not None:
            self.finish, self.stop_reason = "stop", growth.matched
        elif part.finish is not None:
            self._end(part)

    def read(self) -> tuple[str, list[Scored]]:
        """What is new."""
        found = self.new, self.scored
        self.new, self.scored = "", []
        return found

    def _end(self, part: Part) -> None:
        if part.finish == "timeout":  # a limit cut it off: which one, stop_reason says
            self.finish, self.stop_reason = "length", "timeout"
        elif part.finish in ("stop", "length"):
            self.finish, self.stop_reason = part.finish, part.stop_token
        else:
            raise ExecutorError(f"the engine ended the text with {part.finish!r}; send the request again")


@dataclass(frozen=True)
class Prompt:
    """What is sent. text: as it came, or what its tokens say, where it is echoed."""

    tokens: list[int]
    text: str = ""


class Answer:
    """The texts of one prompt. Use as a context manager: left before the end, the engine is told to end them."""

    def __init__(
        self,
        reply: Reply,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        watcher: Watcher | None = None,
        shown: Collection[int] = (),
        own_deadline: bool = False,
    ) -> None:
        """`shown`: special tokens that have a text, since a parser reads them. own_deadline: the request stated one."""
        self._reply, self._watcher, self._params, self._own = reply, watcher, params, own_deadline
        self.prompt = prompt
        width = params.n if params.use_beam_search else params.width
        self.texts = [Text(i, _growth(params, prompt.tokens, tokenizer, shown)) for i in range(width)]
        self.prompt_logprobs: list[dict[int, float] | None] | None = None
        self.reused_tokens = 0
        self._left = width
        self._stopped: dict[int, str] = {}

    @property
    def done(self) -> bool:
        return self._left == 0

    @property
    def num_tokens(self) -> int:
        """Generated, of the texts that were not chosen as well."""
        return sum(text.num_tokens for text in self.texts)

    async def more(self) -> list[Text]:
        """The texts that have grown or ended. Raises the request's error."""
        parts = await self._reply.parts()
        if self._watcher is not None:
            self._watcher.parts(parts)
        grown: dict[int, Text] = {}
        for part in parts:
            if (text := self.texts[part.index]).finish is None:
                grown[part.index] = text
                self._take(text, part)
        if self._params.use_beam_search and grown:  # they come whole, and may be fewer
            self.texts = self.texts[: len(grown)]
            self._left = 0
        if not self._left:
            self._refuse_unstarted()
        return list(grown.values())

    async def all(self) -> list[Text]:
        """The best of all texts, ended; in the order of their likelihood where there are more than were asked for."""
        while not self.done:
            await self.more()
        if len(self.texts) <= self._params.n:
            return self.texts
        best = sorted(self.texts, key=lambda text: -(text.likelihood if text.num_tokens else -math.inf))
        return best[: self._params.n]

    def _take(self, text: Text, part: Part) -> None:
        if part.prompt_logprobs is not None:
            self.prompt_logprobs = part.prompt_logprobs
        if part.times is not None:
            self.reused_tokens = max(self.reused_tokens, part.times.reused_tokens)
        text.take(part)
        if text.finish is not None:
            self._left -= 1
            if part.finish is None:
                self._stopped[text.index] = "stop"
                self._reply.abort(text.index)

    def _refuse_unstarted(self) -> None:
        if all(text.stop_reason == "timeout" and not text.num_tokens for text in self.texts):
            raise too_late("token", self._own)

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.done:
            self._reply.abort()
        if self._watcher is not None:
            self._watcher.ended(None if self.done else error, self._stopped)


def _growth(params: SamplingParams, prompt: Sequence[int], tokenizer: Tokenizer, shown: Collection[int]) -> Growth:
    return Growth(
        tokenizer, prompt, stops=params.stop_strings, include=params.include_stop_str_in_output,
        min_tokens=params.min_tokens, skip_special_tokens=params.skip_special_tokens, shown=shown,
    )  # fmt: skip


def scored_prompt(answer: Answer, tokenizer: Tokenizer) -> list[Scored]:
    """The prompt's tokens, each with what it was expected with; of the first nothing is known."""
    known = answer.prompt_logprobs or [None] * len(answer.prompt.tokens)
    growth, found = Growth(tokenizer), list[Scored]()
    for token, scores in zip(answer.prompt.tokens, known, strict=True):
        found.append(Scored(token, scores or {}, growth.certain))
        growth.add(token)
    return found
