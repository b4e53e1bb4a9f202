"""`penstock check`: would this model, format, device and memory fit? Answered from config and headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags, layers
from penstock.cli.console import amount, formats, result, result_json, table
from penstock.errors import PenstockError

if TYPE_CHECKING:
    from penstock.compiler.options import BuildOptions
    from penstock.engine.device import Device

Data = dict[str, Any]


def check(
    model: flags.Model = None,
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    task: flags.Task = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="KIND", help="auto, cuda, cpu; or h200, without one at hand.")
    ] = "auto",
    memory_gb: Annotated[
        float | None, typer.Option("--memory_gb", metavar="GB", help="Memory of the device; default: what it has.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option("--gpu_memory_utilization", metavar="SHARE", help="Share of a GPU's memory to use.")
    ] = 0.9,
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    weights: flags.Weights = "checkpoint",
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Say whether a model fits, or an engine is for this machine. Nothing is loaded.

    Exit code: 0 it fits, 1 it does not, or cannot be read.
    """
    from penstock import bundled
    from penstock.cli.probe import RECORDS, budget_of, target_device
    from penstock.compiler.options import BuildOptions
    from penstock.models.hub import resolve

    target = target_device(device)
    budget = budget_of(target, memory_gb, gpu_memory_utilization)
    limits = (max_batch_size, max_num_tokens, max_seq_len)
    options = BuildOptions(dtype, weights, target.kind, *limits, kv_cache_dtype=kv_cache_dtype, task=task)
    try:
        path = resolve(model) if model else bundled.target()
        data = _report(path, options, target, budget, named=device.lower() in RECORDS)
    except PenstockError as error:
        if as_json:
            result_json({"fits": False, "error": type(error).__name__, "verdict": str(error)})
        raise
    if as_json:
        result_json(data)
    else:
        result(_text(data) if "model" in data else _engine_text(data))
    if not data["fits"]:
        raise typer.Exit(1)


def _report(path: Path, options: BuildOptions, target: Device, budget: int, named: bool) -> Data:
    from penstock.cli import check_engine, check_report
    from penstock.engine import store

    if store.is_engine(path):
        return check_engine.report(path, options, target, budget, named)
    return check_report.report(path, options, target, budget)


def _engine_text(data: Data) -> str:
    made = ", ".join(f"{name} {version}" for name, version in data["made_for"].items() if name != "device")
    rows = [
        ("engine", data["engine"]),
        ("made for", f"{data['made_for']['device']} with {made}"),
        ("format", f"{formats(data)} on {data['device']}"),
        ("weights", amount(data["memory"]["weights"])),
        *_memory_rows(data["memory"], data["profile"]),
    ]
    return "\n".join([table(rows, ""), data["verdict"]])


def _text(data: Data) -> str:
    model, memory, profile = data["model"], data["memory"], data["profile"]
    stored = f", {amount(model['checkpoint_bytes'])} stored" if model["checkpoint_bytes"] else ""
    rows = [
        ("family", f"{model['family']} ({', '.join(model['architectures']) or 'by model_type'})"),
        ("parameters", _parameters(model)),
        *(("layers", layers.said(layer)) for layer in model["layers"]),
        ("format", f"{formats(data)} on {data['device']}"),
        ("weights", amount(memory["weights"]) + stored),
        *_memory_rows(memory, profile),
    ]
    lines = [table(rows, "")]
    lines += [f"on the reference alone (slow): {op}: {why}" for op, why in data["references"].items()]
    return "\n".join([*lines, data["verdict"]])


def _parameters(model: Data) -> str:
    every, active = (amount(model[key], "").strip() for key in ("parameters", "active_parameters"))
    return every if every == active else f"{every}, {active} of them for a token"


def _memory_rows(memory: Data, profile: Data) -> list[tuple[str, str]]:
    request = f"{amount(memory['kv_per_request'])} for a request of {profile['max_seq_len']} tokens"
    full = f"{amount(memory['at_limits'])} for {profile['max_batch_size']} of full length"
    return [
        ("KV", f"{amount(memory['kv_per_token'])} a token, {request}"),
        ("buffers", f"about {amount(memory['buffers'])} at {profile['max_num_tokens']} tokens a step"),
        *([("driver", f"about {amount(memory['driver'])}: context, graphs, library")] if memory["driver"] else []),
        ("needed", f"{amount(memory['needed'])} for one request; {full}"),
        ("may be used", amount(memory["budget"])),
        *([("a run takes", _run(memory["plan"]))] if "plan" in memory else []),
    ]


def _run(plan: Data) -> str:
    """What `run` says before it loads, and the context."""
    from penstock.engine.memory import blocks_said

    kv = f"{amount(plan['kv'])} of KV ({blocks_said(plan)}, {plan['kv_tokens']} tokens)"
    return f"{amount(plan['total'] + plan['context'])} with {kv}, the context counted"
