"""`penstock bench serve`: load on an OpenAI endpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from penstock.cli import bench, flags
from penstock.cli.console import say
from penstock.errors import OptionError

Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="As the argument; with --base_url the name it serves.")
]
BaseUrl = Annotated[
    str | None, typer.Option("--base_url", metavar="URL", help="A server that runs; else one is started and ended.")
]
Burstiness = Annotated[
    float | None, typer.Option("--burstiness", metavar="X", help="Of --rate: 1 is Poisson, below it burstier.")
]
Goodput = Annotated[
    list[str] | None,
    typer.Option("--goodput", metavar="NAME:MS,...", help="Count requests within ttft:MS, tpot:MS, e2el:MS."),
]
ExtraBody = Annotated[
    str | None, typer.Option("--extra_body", metavar="JSON", help="Further fields of each request, as an object.")
]

# Flags of the server that is started here, with what they are where nothing is said.
ENGINE = {
    "weights": "checkpoint", "dtype": "auto", "kv_cache_dtype": "auto", "device": "auto", "max_batch_size": None,
    "max_num_tokens": None, "max_seq_len": None, "gpu_memory_utilization": 0.9, "cache_dir": None,
}  # fmt: skip
Endpoint = Annotated[str, typer.Option("--endpoint", metavar="NAME", help="completions or chat.")]
Concurrency = Annotated[int | None, typer.Option("--concurrency", metavar="N", help="At most at once.")]
Warmups = Annotated[int, typer.Option("--num_warmups", metavar="N", help="Requests before each run.")]
Ready = Annotated[float, typer.Option("--ready_timeout", metavar="SECONDS", help="For a server started here.")]


def serve(
    model: bench.Subject = None,
    named: Model = None,
    base_url: BaseUrl = None,
    endpoint: Endpoint = "completions",
    workload: bench.Workloads = "random",
    trace: bench.Trace = None,
    input_len: bench.InputLen = None,
    output_len: bench.OutputLen = None,
    prefix_len: bench.PrefixLen = None,
    num_requests: bench.NumRequests = None,
    rate: bench.Rate = None,
    burstiness: Burstiness = None,
    concurrency: Concurrency = None,
    num_warmups: Warmups = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore_eos", help="Ask for texts of full length.")] = False,
    goodput: Goodput = None,
    extra_body: ExtraBody = None,
    api_key: Annotated[str | None, typer.Option("--api_key", metavar="KEY", help="Of the server.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Of each request.")] = 600.0,
    ready_timeout: Ready = 3600.0,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    cache_dir: flags.CacheDir = None,
    plugin: flags.Plugin = None,
    out: bench.Out = None,
    commit: bench.Commit = None,
    plot: bench.Plot = None,
    as_json: flags.Json = False,
) -> None:
    """Load on an OpenAI endpoint: first tokens, inter-token and end-to-end latencies, throughput, errors."""
    asked = locals()
    if importlib.util.find_spec("aiohttp") is None:
        raise OptionError("bench serve needs aiohttp, which is not installed: pip install 'penstock[serve]'")
    from penstock.bench.requests import Given, bounds, parse
    from penstock.bench.serve.figures import goals
    from penstock.bench.serve.report import Wish, serve_report

    bench.check_places(out, plot)
    ins = None if input_len is None else bounds("--input_len", input_len)
    outs = None if output_len is None else bounds("--output_len", output_len)
    works = parse(workload, Given(num_requests, ins, outs, prefix_len, trace, rate, burstiness))
    name = bench.one_of(model, named)
    words = _server_words(None if base_url else name, asked)
    wish = Wish(
        tuple(works), base_url, words, name if base_url else None, endpoint, api_key, concurrency, num_warmups,
        ignore_eos, goals(goodput or ()), timeout, ready_timeout, _object("--extra_body", extra_body), plot,
    )  # fmt: skip
    told = serve_report(wish, say)
    bench.deliver(told.text, told.data, told.records, out, commit, as_json)
    if not told.good:
        say("error: no request succeeded; the kinds of error are above")
        raise typer.Exit(1)


def _server_words(name: str | None, asked: Mapping[str, Any]) -> tuple[str, ...]:
    """What the server that is started here is to be told."""
    from penstock.bench.subject import find

    words = [word for name, usual in ENGINE.items() if asked[name] != usual for word in (f"--{name}", str(asked[name]))]
    words += [word for module in asked["plugin"] or () for word in ("--plugin", module)]
    if name is None:
        return tuple(words)
    subject = find(name, asked["weights"], asked["cache_dir"])
    other = ("--weights", "random") if subject.weights != asked["weights"] else ()
    return (subject.model, *words, *other)


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OptionError(f"{flag} {str(text)[:80]!r} is no JSON object")
    return found
