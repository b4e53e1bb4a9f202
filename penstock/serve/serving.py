"""What the endpoints of a server share."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, ParamSpec, Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import PenstockError, TokenizerError
from penstock.grammar import GuidedDecoding
from penstock.grammar.compiled import Compiled
from penstock.serve.config import ServeConfig
from penstock.serve.errors import Refusal, RequestError, bounded, refusal
from penstock.serve.grammar_process import GrammarClient
from penstock.serve.link import EngineLink, EngineUnready, Reply
from penstock.serve.tools.manner import Manner
from penstock.serve.wire import Part, Submit
from penstock.text import ChatTemplate, Tokenizer
from penstock.text.spelling import Spelling
from penstock.version import __version__

P = ParamSpec("P")
T = TypeVar("T")
_ASIDE: Final = 10_000


class Answered(NamedTuple):
    """A request to the server as it ended. `route`: the path's template, empty for an unknown one. `status`: 0 where
    the client left before there was one. `gone`: whether it left before the end. `refused`: the code of an
    error before the answer began."""

    request_id: str
    method: str
    route: str
    status: int
    started: float
    seconds: float
    gone: bool
    refused: str | None = None


class Watcher(Protocol):
    """Of one of the engine's requests. Its calls must neither raise nor wait."""

    def parts(self, parts: Sequence[Part]) -> None:
        """All that has come since the last time, as it comes."""
        ...

    def ended(self, error: BaseException | None = None, reasons: Mapping[int, str] | None = None) -> None:
        """Once. error: what ended it instead, CancelledError where the client left. reasons: why texts ended, by index,
        where this process ended them."""
        ...


@dataclass
class Hooks:
    """Who hears of what happens. A hook must neither raise nor wait."""

    answered: list[Callable[[Answered], None]] = field(default_factory=list)
    failed: list[Callable[[str, Exception], None]] = field(default_factory=list)  # a request's id, and a 500's error
    # A request goes to the engine: the HTTP request's id, what is sent, its max_tokens, the HTTP headers.
    started: Callable[[str, Submit, int | None, Sequence[tuple[bytes, bytes]]], Watcher] | None = None


class Texts(NamedTuple):
    """What a model's directory says of text. `template`: None where the model has none, or one that cannot be used,
    which `template_error` explains. `manner`: how it writes calls and thoughts."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    template_error: TokenizerError | None
    manner: Manner


@dataclass
class Serving:
    """One server. healthy(now): whether steps move while work waits, and why not; `now` on the monotonic clock.
    `draining`: it is being shut down, and takes nothing new."""

    config: ServeConfig
    link: EngineLink
    hooks: Hooks
    routes: tuple[Endpoint, ...]
    healthy: Callable[[float], tuple[bool, str]]
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _texts: dict[str, asyncio.Future[Texts]] = field(default_factory=dict)
    _spelling: Spelling | None = None
    _grammars: GrammarClient | None = None
    _warming: asyncio.Future[None] | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model; its own name once the engine is ready."""
        own = self.link.facts.get("model")
        return self.config.served_model_names or ((str(own),) if own else ())

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises RequestError for another model's, EngineUnready before it is known."""
        names = self.model_names
        if not names:
            raise self.unready()
        if name is not None and name not in names:
            raise RequestError(
                404,
                f"the model {bounded(name, 100)!r} does not exist; this server has {', '.join(map(repr, names))}",
                "model_not_found",
                "model",
            )
        return name or names[0]

    def check_text(self) -> None:
        """Raises RequestError where the engine gives vectors. Its facts are known."""
        if self.link.facts["embeds"]:
            said = "this engine gives vectors and no text; start one of a model with a head, without --task embed"
            raise RequestError(400, said, "unsupported")

    def submit(
        self, request: Request, new: Submit, max_tokens: int | None = None, grammar: Compiled | None = None
    ) -> tuple[Reply, Watcher | None]:
        """Send what an HTTP request asks of the engine, and tell who watches. Raises as `EngineLink.submit`."""
        reply, started = self.link.submit(new, grammar), self.hooks.started
        if started is None:
            return reply, None
        return reply, started(request.scope["state"]["request_id"], new, max_tokens, request.headers.raw)

    def refusal(self, request_id: str, error: Exception) -> Refusal:
        """What the caller is told of an error; of one that nobody expected the hooks hear."""
        found = refusal(error)
        if found.unexpected:
            for hook in self.hooks.failed:
                hook(request_id, error)
        return found

    def unready(self) -> EngineUnready:
        """Why there is no engine just now."""
        if self.draining:
            return EngineUnready("the server is shutting down; send the request to another", 5.0)
        stage, done, total = self.link.progress
        share = f", {100 * done // total} %" if total else ""
        return EngineUnready(f"the engine is {self.link.state} ({stage}{share}); try again later", 5.0)

    @cached_property
    def fingerprint(self) -> str:
        """Of what answers: the same while server, model and device are."""
        facts = self.link.facts
        known = [__version__, *(str(facts.get(name)) for name in ("model", "dtype", "device", "version"))]
        return f"fp_{hashlib.sha256(chr(0).join(known).encode()).hexdigest()[:10]}"

    async def texts(self) -> Texts:
        """Tokenizer and chat template, read once. Raises EngineUnready before the engine has named its directory,
        TokenizerError where there is no tokenizer that can be read."""
        facts = self.link.facts
        directory = str(facts.get("directory", ""))
        if not directory:
            raise self.unready()
        if directory not in self._texts:
            read = asyncio.to_thread(_read, Path(directory), tuple(facts.get("eos", ())), self.config)
            self._texts[directory] = asyncio.ensure_future(read)
        return await asyncio.shield(self._texts[directory])

    def spelling(self, tokenizer: Tokenizer) -> Spelling:
        """What its tokens stand for by themselves, kept."""
        if self._spelling is None or self._spelling.tokenizer is not tokenizer:
            self._spelling = Spelling(tokenizer)
        return self._spelling

    async def grammars(self) -> GrammarClient:
        """What compiles them, until `close`."""
        tokenizer, facts = (await self.texts()).tokenizer, self.link.facts
        if self._grammars is None:
            self._grammars = GrammarClient(tokenizer, facts["vocab_size"], facts["eos"])
        return self._grammars

    def warm(self) -> None:
        """Start what compiles grammars, in the background: the first who needs it would wait for seconds."""
        self._warming = asyncio.ensure_future(self._warm())

    async def _warm(self) -> None:
        with suppress(PenstockError):  # it has no grammars; whoever asks for one is told why
            await (await self.grammars()).compile(GuidedDecoding(json_object=True))

    def close(self) -> None:
        """End what was started."""
        if self._warming is not None:
            self._warming.cancel()
        if self._grammars is not None:
            self._grammars.close()


def _read(directory: Path, eos: Sequence[int], config: ServeConfig) -> Texts:
    tokenizer, template, wrong = Tokenizer.from_dir(directory, eos_token_ids=eos), None, None
    try:
        template = ChatTemplate.from_dir(directory)
    except TokenizerError as error:
        wrong = error
    return Texts(tokenizer, template, wrong, Manner.of(template, config.tool_call_parser, config.reasoning_parser))


Handler = Callable[[Request, Serving], Coroutine[Any, Any, Response]]


@dataclass(frozen=True)
class Endpoint:
    """One method of one path. body: what it takes; gives: what it answers with, a model of pydantic or a media type,
    or nothing; errors: the statuses that it may answer with, besides those that any path has, or any with a body;
    also: those with another body than an error's; streams: one event, where it can stream; parameters: of the path,
    (name, what it is).
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    gives: type[BaseModel] | str | None = None
    errors: tuple[int, ...] = ()
    also: tuple[tuple[int, type[BaseModel]], ...] = ()
    streams: type[BaseModel] | None = None
    parameters: tuple[tuple[str, str], ...] = ()


async def aside(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` gives; in another thread where `size`, in characters or tokens, says that it takes a while."""
    if size <= _ASIDE:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)
