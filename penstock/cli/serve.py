"""`penstock serve`: the HTTP server, and the engine in a process of its own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, result, say
from penstock.errors import OptionError

if TYPE_CHECKING:
    from penstock.serve.config import ServeConfig
    from penstock.serve.serving import Serving

FORCED = 130
QUEUED = 2048  # requests that may wait where nothing is said: more would only time out


def _option(name: str, metavar: str, about: str) -> Any:
    return typer.Option(name, metavar=metavar, help=about)


Host = Annotated[str, _option("--host", "ADDRESS", "0.0.0.0 for all; then give keys.")]
Port = Annotated[int, _option("--port", "N", "0 for any that is free.")]
Names = Annotated[list[str] | None, _option("--served_model_name", "NAME", "What requests call it; may be repeated.")]
Keys = Annotated[list[str] | None, _option("--api_key", "KEY", "Ask requests for a key; may be repeated.")]
KeyFile = Annotated[Path | None, _option("--api_key_file", "FILE", "The same, a key a line, seen by nobody.")]
BodyBytes = Annotated[int, _option("--max_body_bytes", "N", "Most bytes of a request.")]
Prompts = Annotated[int, _option("--max_prompts", "N", "Most prompts of a request.")]
MostN = Annotated[int, _option("--max_n", "N", "Most texts of a prompt.")]
MostStop = Annotated[int, _option("--max_stop", "N", "Most stop strings of a request.")]
MostLogprobs = Annotated[int, _option("--max_logprobs", "N", "Most log-probabilities of a token.")]
Deadline = Annotated[float | None, _option("--timeout", "SECONDS", "Of a request that states none; else for ever.")]
QueueTimeout = Annotated[float | None, _option("--queue_timeout", "SECONDS", "The same, until it runs.")]
Drain = Annotated[float, _option("--drain_timeout", "SECONDS", "What running requests have at the end.")]
Write = Annotated[float, _option("--write_timeout", "SECONDS", "A client that reads nothing for so long is left.")]
Stall = Annotated[float, _option("--stall_timeout", "SECONDS", "Without a step: /health says 503.")]
Hang = Annotated[float, _option("--hang_timeout", "SECONDS", "Without a step: the engine is restarted. 0: never.")]
QueuedReqs = Annotated[int, _option("--max_num_queued_reqs", "N", "Most requests that wait; others get 429.")]
QueuedTokens = Annotated[int | None, _option("--max_num_queued_tokens", "N", "Most tokens of their prompts.")]
Origins = Annotated[list[str] | None, _option("--cors_origin", "ORIGIN", "Web pages that may call; may be repeated.")]
Cert = Annotated[Path | None, _option("--ssl_certfile", "FILE", "Serve HTTPS: the certificate chain, PEM.")]
CertKey = Annotated[Path | None, _option("--ssl_keyfile", "FILE", "And its key.")]
LogFormat = Annotated[str, _option("--log_format", "FORM", "text or json.")]
LogLevel = Annotated[str, _option("--log_level", "LEVEL", "debug, info, warning or error.")]
Otlp = Annotated[str | None, _option("--otlp_traces_endpoint", "URL", "Send OpenTelemetry traces there.")]
CrashDir = Annotated[Path | None, _option("--crash_dir", "DIR", "Where reports of crashes are kept.")]
ToolParser = Annotated[str, _option("--tool_call_parser", "STYLE", "auto, llama3_json, hermes, mistral or none.")]
Reasoning = Annotated[str, _option("--reasoning_parser", "STYLE", "auto, qwen3 or none.")]
# Loaded by the engine's process, not by this one.
Plugins = Annotated[list[str] | None, _option("--plugin", "MODULE", "Load a module's own parts; may be repeated.")]

# Flags that are arguments of LLM, and those that are fields of ServeConfig, by the same names.
ENGINE = (
    "model", "weights", "dtype", "kv_cache_dtype", "task", "device", "max_batch_size", "max_num_tokens", "max_seq_len",
    "gpu_memory_utilization", "max_gpu_bytes", "max_num_queued_reqs", "max_num_queued_tokens",
)  # fmt: skip
CONFIG = (
    "host", "port", "max_body_bytes", "max_prompts", "max_n", "max_stop", "max_logprobs", "timeout",
    "queue_timeout", "drain_timeout", "write_timeout", "stall_timeout", "hang_timeout", "ssl_certfile", "ssl_keyfile",
    "log_format", "log_level", "otlp_traces_endpoint", "crash_dir", "tool_call_parser", "reasoning_parser",
)  # fmt: skip


def serve(
    model: flags.Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Names = None,
    api_key: Keys = None,
    api_key_file: KeyFile = None,
    max_body_bytes: BodyBytes = 8 << 20,
    max_prompts: Prompts = 256,
    max_n: MostN = 128,
    max_stop: MostStop = 16,
    max_logprobs: MostLogprobs = 20,
    timeout: Deadline = None,
    queue_timeout: QueueTimeout = None,
    drain_timeout: Drain = 30.0,
    write_timeout: Write = 120.0,
    stall_timeout: Stall = 20.0,
    hang_timeout: Hang = 120.0,
    max_num_queued_reqs: QueuedReqs = QUEUED,
    max_num_queued_tokens: QueuedTokens = None,
    cors_origin: Origins = None,
    ssl_certfile: Cert = None,
    ssl_keyfile: CertKey = None,
    log_format: LogFormat = "text",
    log_level: LogLevel = "info",
    otlp_traces_endpoint: Otlp = None,
    crash_dir: CrashDir = None,
    tool_call_parser: ToolParser = "auto",
    reasoning_parser: Reasoning = "auto",
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    task: flags.Task = "auto",
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    max_gpu_bytes: flags.GpuBytes = None,
    cache_dir: flags.CacheDir = None,
    plugin: Plugins = None,
) -> int:
    """Serve a model over HTTP, as OpenAI's API; without arguments the bundled one. Ctrl-C drains and ends."""
    asked = locals()
    try:
        from penstock.serve import server
        from penstock.serve.supervisor import Supervisor
    except ImportError as error:
        raise OptionError(f"serving needs {error.name}; install it: pip install 'penstock[serve]'") from error
    arguments = _engine_arguments(asked)
    config = _config(asked, arguments)
    _warn(config, bool(api_key))
    with Progress() as progress:
        watched = Supervisor(arguments, crash_dir=crash_dir, hang_timeout=hang_timeout, stall_timeout=stall_timeout)
        one = server.open_server(config, watched)
        return 0 if one.run(lambda: _begin(one.serving, one.port), progress) else FORCED


def _engine_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of LLM, as JSON can carry them."""
    folder = given["cache_dir"]
    own = {"cache_dir": None if folder is None else str(folder), "plugins": given["plugin"] or []}
    return {name: given[name] for name in ENGINE} | own


def _config(asked: Mapping[str, Any], engine: dict[str, Any]) -> ServeConfig:
    from penstock.serve.config import ServeConfig, read_keys

    names, origins, file = asked["served_model_name"], asked["cors_origin"], asked["api_key_file"]
    return ServeConfig(
        engine=engine, served_model_names=tuple(names or ()), cors_origins=tuple(origins or ()),
        api_keys=(*(asked["api_key"] or ()), *(read_keys(file) if file else ())),
        **{name: asked[name] for name in CONFIG},
    )  # fmt: skip


def _warn(config: ServeConfig, in_argv: bool) -> None:
    if in_argv:
        say("warning: a key given by --api_key is seen in this machine's list of processes; --api_key_file hides it")
    if not config.is_loopback and not config.api_keys:
        say(
            f"WARNING: other machines can reach {config.host}, and no key is asked for: anybody there can use this "
            f"server; give --api_key_file, or --host 127.0.0.1"
        )


def _begin(serving: Serving, port: int) -> None:
    result(_ready(serving, port))
    serving.warm()


def _ready(serving: Serving, port: int) -> str:
    """One line, that ends with a command to try."""
    config, name = serving.config, serving.model_names[0]
    url = config.url_at(port)
    embeds, text = serving.link.facts.get("embeds"), "Once upon a time"
    asked = json.dumps({"model": name} | ({"input": text} if embeds else {"prompt": text, "max_tokens": 32}))
    path = "embeddings" if embeds else "completions"
    key = " -H 'Authorization: Bearer KEY'" if config.api_keys else ""
    insecure = " -k" if config.ssl_certfile else ""
    return (
        f"ready: {name} at {url} (Ctrl-C ends it); try: curl{insecure} {url}/v1/{path} -H "
        f"'Content-Type: application/json'{key} -d {shlex.quote(asked)}"
    )
