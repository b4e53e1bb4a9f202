"""One server's life: it listens at once, opens its engine, serves, and ends in order."""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Final, Protocol

import uvicorn
import uvloop

from penstock.errors import OptionError, PenstockError
from penstock.serve.app import Application, create_app
from penstock.serve.config import ServeConfig
from penstock.serve.link import EngineLink
from penstock.serve.monitor import Monitor
from penstock.serve.protocol import Protocol as HttpProtocol
from penstock.serve.routes import ROUTES
from penstock.serve.serving import Endpoint, Hooks, Serving

Progress = Callable[[str, int, int], None]

_TICK: Final = 0.05  # seconds between looks at the engine's state while it opens
_OVER: Final = (1, 1)  # done and total of a stage that has ended
_GRACE: Final = 5.0  # seconds that answers have to go out once the engine has ended
_COLLECT: Final = (20_000, 20, 20)  # as gc.set_threshold: with 500 streams a full pass holds them up for 30 ms
KEEP_ALIVE: Final = 60  # seconds that an idle connection is kept


class Runner(Protocol):
    """Whoever starts and ends the engine; `supervisor.Supervisor` is the real one."""

    @property
    def link(self) -> EngineLink: ...

    @property
    def error(self) -> PenstockError | None:
        """What keeps the engine from ever being opened, in state "stopped"."""
        ...

    def start(self) -> None:
        """Begin opening."""
        ...

    async def stop(self) -> None:
        """End the engine process; what still runs ends with an error."""
        ...

    def healthy(self, now: float) -> tuple[bool, str]:
        """See `serving.Serving`."""
        ...


def listen(config: ServeConfig) -> socket.socket:
    """The socket, bound. Raises OptionError where host or port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OptionError(f"host={config.host!r} is no address of this machine: {error.strerror}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        remedy = "give another --port" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        raise OptionError(f"port={config.port} of {config.host} cannot be had: {error.strerror}; {remedy}") from error
    return found


@dataclass
class OpenServer:
    """One whose socket is bound and whose options are checked; nothing is started."""

    app: Application
    runner: Runner
    monitor: Monitor
    at: socket.socket

    @property
    def serving(self) -> Serving:
        return self.app.serving

    @property
    def port(self) -> int:
        return int(self.at.getsockname()[1])

    def run(self, ready: Callable[[], None], progress: Progress) -> bool:
        """Serve until a signal. `ready` is called when the engine is, for the first time; progress(stage, done, total)
        before. Returns whether it ended in order: False behind a second signal. Raises what keeps the engine from ever
        being opened."""
        server = _Server(self.app, self.runner)
        _raise_file_limit()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(_run(server, self, ready, progress))
        return not server.force_exit


def open_server(
    config: ServeConfig, runner: Runner, routes: Sequence[Endpoint] = ROUTES, hooks: Hooks | None = None
) -> OpenServer:
    """Raises OptionError for what cannot be served: a port in use, TLS files that are none."""
    config.tls()
    monitor = Monitor(config, runner.link)
    hooks = monitor.join(hooks or Hooks())
    app = create_app(config, runner.link, (*routes, *monitor.routes), hooks, runner.healthy)
    return OpenServer(app, runner, monitor, listen(config))


async def _run(server: _Server, opened: OpenServer, ready: Callable[[], None], progress: Progress) -> None:
    runner = opened.runner
    monitor = asyncio.create_task(opened.monitor.run())
    runner.start()
    watch = asyncio.create_task(_watch(server, runner, ready, progress))
    try:
        await server.serve([opened.at])
    finally:
        watch.cancel()
        if not server.force_exit:  # or else it ends with us
            await runner.stop()
        monitor.cancel()
        await asyncio.gather(monitor, return_exceptions=True)
        server.close()
    if runner.error is not None:
        raise runner.error


async def _watch(server: _Server, runner: Runner, ready: Callable[[], None], progress: Progress) -> None:
    """Tell what the engine does until it is ready, and end the server where it can never be."""
    link = runner.link
    told: tuple[str, int, int] | None = None
    while link.state in ("loading", "restarting"):
        if link.progress != told:
            if told is not None and told[0] != link.progress[0] and told[1:] != _OVER:
                progress(told[0], *_OVER)
            told = link.progress
            progress(*told)
        await asyncio.sleep(_TICK)
    if told is not None and told[1:] != _OVER:
        progress(told[0], *_OVER)
    if link.state == "ready":
        # What is there by now stays. Looked through again and again it would hold up all streams for 0.1 s each time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        ready()
    while link.state != "stopped":
        await asyncio.sleep(10 * _TICK)
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's, which drains at a first signal and ends at a second, whichever they are."""

    def __init__(self, app: Application, runner: Runner) -> None:
        config, tls = app.serving.config, app.serving.config.tls()
        self.serving, self._runner = app.serving, runner
        protocol: Any = partial(HttpProtocol, write_timeout=config.write_timeout)
        super().__init__(
            uvicorn.Config(
                app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=round(config.drain_timeout + _GRACE),
                ssl_context_factory=None if tls is None else lambda *_: tls,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self.serving.draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.serving.draining = True
        end = asyncio.get_running_loop().call_later(self.serving.config.drain_timeout, self._end)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()

    def close(self) -> None:
        self.serving.close()

    def _end(self) -> None:
        """Time is up: what still runs ends with the engine's error, which its client is told."""
        self._ending = asyncio.ensure_future(self._runner.stop())


def _raise_file_limit() -> None:
    """A connection is a file, and the usual limit is low."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
