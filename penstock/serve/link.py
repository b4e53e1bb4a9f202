"""The engine as the HTTP process sees it. `client.EngineClient` is the real one; tests may have one of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from penstock.errors import PenstockError
from penstock.grammar.compiled import Compiled
from penstock.serve.wire import Beat, Part, Submit

State = Literal["loading", "ready", "restarting", "stopped"]


class EngineDied(PenstockError):
    """The engine process ended, or was ended since it hung; every request that it had ends with this."""


class EngineUnready(PenstockError):
    """There is no engine at the moment: it is being opened, restarted or shut down. `retry_after`: seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Reply(Protocol):
    """What comes of one request."""

    async def parts(self) -> list[Part]:
        """Wait until there is something; all that has come, in order: more the later it is asked.

        Raises the request's error: a class of `penstock.errors` by its name, or EngineDied. Not to be asked again
        behind that, nor behind the last text's finish.
        """
        ...

    def abort(self, index: int | None = None) -> None:
        """End the request, or one of its texts, now; of what was aborted no part comes. Of one that ended: nothing."""
        ...


class EngineLink(Protocol):
    """One engine, whatever process it is in."""

    @property
    def state(self) -> State: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the engine that ran last; empty before the first is ready. model: its name; directory: where tokenizer
        and chat template lie; vocab_size, max_seq_len, max_batch_size, max_num_tokens; eos: ids; generation: defaults
        of its generation_config; dtype, device, version; embeds: whether it gives vectors instead of text;
        embedding_size: numbers of one."""
        ...

    @property
    def beat(self) -> Beat | None:
        """The newest."""
        ...

    @property
    def progress(self) -> tuple[str, int, int]:
        """Of opening: stage, done, total."""
        ...

    @property
    def restarts(self) -> int: ...

    def submit(self, new: Submit, grammar: Compiled | None = None) -> Reply:
        """Send a request; `grammar`: what its key stands for.

        Raises EngineUnready where there is no engine; its refusals come with `parts`."""
        ...
