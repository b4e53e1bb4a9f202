"""`penstock bench`: figures of a model or an engine, each with its share of the roof."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags, unbuilt
from penstock.cli.console import Progress, amount, counted, result, result_json, say, table
from penstock.errors import OptionError

if TYPE_CHECKING:
    from penstock.bench.kernels import Timed
    from penstock.bench.records import Record

app = typer.Typer(help="Measure a model or an engine, against the roof of this machine.")

Subject = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="As everywhere, or a workload's name such as llama3.1-8b; else the bundled model."
    ),
]
Named = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same as the argument.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Append the records as JSON lines.")]
Commit = Annotated[
    str | None, typer.Option("--commit", metavar="NAME", help="Stands in the records, where the tree is no checkout.")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw it (needs matplotlib).")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of each decode rate; the median counts.")]
NewTokens = Annotated[int, typer.Option("--new_tokens", metavar="N", help="Tokens that each request generates.")]

_WORKLOADS = (
    "random, mixed, lognormal, shared-prefix, interrupted, trace, or IN/OUT lengths such as 128/2048; each with :COUNT "
    "requests and @BATCH at most at once, where they differ."
)
Workloads = Annotated[str, typer.Option("--workload", metavar="NAME,...", help=_WORKLOADS)]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", metavar="FILE", help="JSON lines: prompt_tokens or prompt, output_tokens, arrival."),
]
InputLen = Annotated[str | None, typer.Option("--input_len", metavar="N|LOW:HIGH", help="Tokens of a prompt.")]
OutputLen = Annotated[
    str | None, typer.Option("--output_len", metavar="N|LOW:HIGH", help="Tokens to generate; lognormal: the median.")
]
PrefixLen = Annotated[int | None, typer.Option("--prefix_len", metavar="N", help="Tokens that all prompts share.")]
NumRequests = Annotated[int | None, typer.Option("--num_requests", metavar="N", help="How many; of a trace the first.")]
Rate = Annotated[
    float | None, typer.Option("--rate", metavar="N", help="Requests a second, by a Poisson process; else all at once.")
]
Static = Annotated[bool, typer.Option("--static", help="Also in batches that wait for their longest, for the ratio.")]
NoReuse = Annotated[bool, typer.Option("--no_prefix_caching", help="Compute the KV of equal prefixes each time.")]
LatencyTarget = Annotated[float | None, typer.Option("--inter_token_latency_target", metavar="SECONDS", help="Of LLM.")]


@app.command("latency")
def latency(
    model: Subject = None,
    named: Named = None,
    iterations: Annotated[
        int, typer.Option("--iterations", metavar="N", help="First tokens at each prompt length.")
    ] = 100,
    repeats: Repeats = 3,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,...", help="Prompt lengths.")
    ] = "10,50,100,150,200,250,300,350,400",
    batches: Annotated[str, typer.Option("--batches", metavar="N,...", help="Batches to decode.")] = "1,8,64",
    new_tokens: NewTokens = 256,
    prefill: Annotated[bool, typer.Option("--prefill", help="Also 64 prompts of 2048 tokens.")] = False,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also 512 mixed requests, in flight and in batches that wait.")
    ] = False,
    start: Annotated[
        bool, typer.Option("--start", help="Also the seconds to a first token, first and cached.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="PEER,...", help="eager, compile, cudagraph, compile+cudagraph, vllm."),
    ] = None,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    cache_dir: flags.CacheDir = None,
    out: Out = None,
    commit: Commit = None,
    plot: Plot = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """First tokens by prompt length, decode rate by batch; --against: beside Hugging Face and vLLM."""
    from penstock.bench.figures import Effort
    from penstock.bench.session import Extras, latency_report

    check_places(out, plot)
    effort = Effort(iterations, repeats, new_tokens, numbers("--batches", batches), numbers("--lengths", lengths))
    extras = Extras(prefill, throughput, start, against, plot)
    llm_arguments = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device, "max_batch_size": max_batch_size,
        "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "gpu_memory_utilization": gpu_memory_utilization, "cache_dir": cache_dir,
    }  # fmt: skip
    told = latency_report(one_of(model, named), weights, effort, extras, Progress(), say, llm_arguments)
    deliver(told.text, told.data, told.records, out, commit, as_json)


@app.command("scaling")
def scaling(
    model: Subject = None,
    named: Named = None,
    batches: Annotated[
        str, typer.Option("--batches", metavar="N,...", help="Requests at once.")
    ] = "1,2,4,8,16,32,64,128,256,512",
    contexts: Annotated[
        str | None,
        typer.Option("--contexts", metavar="N,...", help="Prompt tokens; default: 1024 to 32768, or 64 to 512"),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Every combination, not only the two edges of the table.")
    ] = False,
    new_tokens: NewTokens = 32,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_num_tokens: flags.NumTokens = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    cache_dir: flags.CacheDir = None,
    out: Out = None,
    commit: Commit = None,
    plot: Plot = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Rate, first token and memory by batch and context, each against its roof. An engine keeps its own limits."""
    from penstock.bench.session import scaling_report

    check_places(out, plot)
    wanted = numbers("--batches", batches), numbers("--contexts", contexts) if contexts else ()
    llm_arguments = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device, "max_num_tokens": max_num_tokens,
        "gpu_memory_utilization": gpu_memory_utilization, "cache_dir": cache_dir,
    }  # fmt: skip
    told = scaling_report(one_of(model, named), weights, wanted, grid, new_tokens, plot, Progress(), say, llm_arguments)
    deliver(told.text, told.data, told.records, out, commit, as_json)


@app.command("throughput")
def throughput(
    model: Subject = None,
    named: Named = None,
    workload: Workloads = "mixed",
    trace: Trace = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    prefix_len: PrefixLen = None,
    num_requests: NumRequests = None,
    rate: Rate = None,
    static: Static = False,
    no_prefix_caching: NoReuse = False,
    inter_token_latency_target: LatencyTarget = None,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    cache_dir: flags.CacheDir = None,
    out: Out = None,
    commit: Commit = None,
    plot: Plot = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Many requests, batched in flight: output rate, first tokens, inter-token times, GPU busy share."""
    from penstock.bench.load import Wish, throughput_report
    from penstock.bench.requests import Given, bounds, parse

    check_places(out, plot)
    ins = None if input_len is None else bounds("--input_len", input_len)
    outs = None if output_len is None else bounds("--output_len", output_len)
    works = parse(workload, Given(num_requests, ins, outs, prefix_len, trace, rate))
    wish = Wish(tuple(works), static, not no_prefix_caching, plot)
    llm_arguments = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens,
        "max_seq_len": max_seq_len, "gpu_memory_utilization": gpu_memory_utilization, "cache_dir": cache_dir,
        "inter_token_latency_target": inter_token_latency_target,
    }  # fmt: skip
    told = throughput_report(one_of(model, named), weights, wish, Progress(), say, llm_arguments)
    deliver(told.text, told.data, told.records, out, commit, as_json)


@app.command("kernels")
def kernels(
    engine: flags.Engine,
    op: Annotated[str | None, typer.Option("--op", metavar="OP", help="Only this operation.")] = None,
    bucket: Annotated[
        str | None, typer.Option("--bucket", metavar="SIZE", help="Only this timed size, such as T64 or L8.")
    ] = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Every tactic that the build timed: bytes and operations a second, and the share of the roof."""
    from penstock.bench.kernels import roof_of, tactics, to_json
    from penstock.engine import store

    roof = roof_of(store.load(engine))
    rows = tactics(engine, roof, op, bucket)
    if as_json:
        result_json(to_json(rows))
        return
    if roof is None:
        say("the build measured no rate of this device: there is no share of the roof")
    result(_tactics(rows))


@app.command("claims")
def claims(
    model: Subject = None,
    named: Named = None,
    repeats: Repeats = 3,
    new_tokens: NewTokens = 256,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_seq_len: flags.SeqLen = None,
    cache_dir: flags.CacheDir = None,
    out: Out = None,
    commit: Commit = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """What fused operations and CUDA graphs are worth: the same model without them. Builds it twice."""
    from penstock.bench.session import claims_report

    check_places(out)
    llm_arguments = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device, "max_seq_len": max_seq_len,
        "cache_dir": cache_dir,
    }  # fmt: skip
    told = claims_report(one_of(model, named), weights, repeats, new_tokens, Progress(), llm_arguments)
    deliver(told.text, told.data, told.records, out, commit, as_json)


for name, about in unbuilt.BENCHES.items():
    app.command(name, help=about, context_settings=unbuilt.ANYTHING)(unbuilt.verb(f"bench {name}"))


def check_places(*places: Path | None) -> None:
    """Raises OptionError, before anything is measured, where a file cannot be written to its place."""
    for place in places:
        if place is None:
            continue
        folder = next((p for p in place.parents if p.exists()), place.parent)
        if place.is_dir() or not os.access(place if place.exists() else folder, os.W_OK):
            raise OptionError(f"{place} cannot be written; name a file in a folder that can")


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Numbers with commas between. Raises OptionError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise OptionError(f"{flag} {text!r} is no list of numbers; give some like 1,8,64")
    return tuple(int(word) for word in words)


def one_of(argument: str | None, option: str | None) -> str | None:
    """The model, by argument or by --model. Raises OptionError for two different ones."""
    if argument and option and argument != option:
        raise OptionError(f"--model {option!r} contradicts the argument {argument!r}; name one of them")
    return argument or option


def deliver(text: str, data: Any, records: list[Record], out: Path | None, commit: str | None, as_json: bool) -> None:
    from penstock.bench.records import append

    if out is not None:
        append(out, [record if commit is None else replace(record, commit=commit) for record in records])
        say(f"{counted(len(records), 'record')} appended to {out}")
    if as_json:
        result_json(data)
    else:
        result(text)


def _tactics(rows: list[Timed]) -> str:
    """A heading for each operation and size, its tactics below; `*` stands at what runs."""
    lines: list[str] = []
    heads: dict[str, list[Timed]] = {}
    for row in rows:
        heads.setdefault(f"{row.at}  {row.site}", []).append(row)
    for head, group in heads.items():
        least = group[0].cost
        lines.append(f"{head}\n  at least {amount(least.bytes)}, {amount(least.flops, 'FLOP')}")
        lines.append(table([_tactic(row) for row in group], indent="    "))
    return "\n".join([*lines, _LEGEND])


def _tactic(row: Timed) -> tuple[str, ...]:
    mark = "*" if row.chosen else " "
    if row.median_us is None:
        return (mark, "refused", "", "", "", row.tactic, row.refused)
    share = "" if row.share is None else f"{row.share:.1%}"
    rates = amount(row.bytes_per_s or 0.0, "B/s"), amount(row.flops_per_s or 0.0, "FLOP/s")
    return (mark, f"{row.median_us:.2f} us", *rates, share, row.tactic)


_LEGEND = (
    "* runs in a step. Rates count each operand once, and the operations of matrix products; the share is of the\n"
    "longer of the two at best. Over 100 %: activations stay in the cache, or the burst rate was measured lower."
)
