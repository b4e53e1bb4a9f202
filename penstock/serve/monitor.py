"""All that watches one server: its gauges, metrics, log and traces, and the endpoints that show them."""

from __future__ import annotations

import asyncio
import logging.config

from penstock.serve import logs
from penstock.serve.config import ServeConfig
from penstock.serve.link import EngineLink
from penstock.serve.live import Live
from penstock.serve.metrics import Metrics
from penstock.serve.routes import metrics, page
from penstock.serve.serving import Endpoint, Hooks
from penstock.serve.tracing import Tracer
from penstock.serve.watch import Watch


class Monitor:
    """Of one server; `run` beside it."""

    def __init__(self, config: ServeConfig, link: EngineLink) -> None:
        """Raises OptionError for a collector of traces that cannot be used."""
        self._config, self._link = config, link
        self._tracer = Tracer(config.otlp_traces_endpoint) if config.otlp_traces_endpoint is not None else None
        self._live = Live(link)
        self._metrics = Metrics(self._live, self._name)
        self._watch = Watch(self._metrics, self._tracer)

    @property
    def routes(self) -> tuple[Endpoint, ...]:
        return (*page.endpoints(self._live), *metrics.endpoints(self._metrics))

    def join(self, hooks: Hooks) -> Hooks:
        """Hear of everything."""
        self._watch.join(hooks)
        return hooks

    async def run(self) -> None:
        """Write the log its way, and follow the engine's beats; until it is cancelled, when the last spans go out."""
        logging.config.dictConfig(logs.config(self._config.log_format, self._config.log_level))
        try:
            await self._live.watch()
        finally:
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    def _name(self) -> str:
        """What requests call the model; empty until it is known."""
        return (*self._config.served_model_names, str(self._link.facts.get("model", "")))[0]
