"""`penstock build`: a checkpoint becomes an engine directory; takes the flags of the classic flow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, amount, result, result_json, say
from penstock.errors import OptionError, UnsupportedError
from penstock.unsupported import refuse

if TYPE_CHECKING:
    from penstock.compiler.options import BuildOptions

GEMM_PLUGINS = ("auto", "disable", "float16", "bfloat16", "fp8")
VENDOR = {"linear": "cublas"}  # the tactics that are a library's products
ON = ("enable", "true", "on", "1")


def build(
    checkpoint_dir: flags.Checkpoint = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", metavar="DIR", help="Default: in the cache. An engine there is replaced."),
    ] = None,
    gemm_plugin: Annotated[
        str, typer.Option("--gemm_plugin", metavar="|".join(GEMM_PLUGINS), help="Restrict which products may compete.")
    ] = "auto",
    max_batch_size: flags.BatchSize = None,
    max_input_len: Annotated[
        int | None, typer.Option("--max_input_len", metavar="N", help="Longest prompt expected.")
    ] = None,
    max_seq_len: flags.SeqLen = None,
    max_num_tokens: flags.NumTokens = None,
    paged_kv_cache: Annotated[
        str, typer.Option("--paged_kv_cache", metavar="enable", help="KV is always paged.")
    ] = "enable",
    use_inflight_batching: Annotated[
        bool, typer.Option("--use_inflight_batching", help="Batching is always in flight.")
    ] = False,
    quant_mode: Annotated[str | None, typer.Option("--quant_mode", metavar="MODE", help="Not built yet.")] = None,
    tactic: flags.Tactics = None,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    task: flags.Task = "auto",
    device: flags.Device = "auto",
    cache_dir: flags.CacheDir = None,
    plugin: flags.Plugin = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the weights' bytes with an engine found built.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Build an engine, or find it built. Prints its directory."""
    if quant_mode is not None:
        refuse("quant_mode", quant_mode)
    check_classic(paged_kv_cache, use_inflight_batching)
    from penstock import bundled
    from penstock.compiler.options import BuildOptions
    from penstock.models.hub import resolve

    model = resolve(checkpoint_dir) if checkpoint_dir else bundled.target()
    pins, dtype = restrict(gemm_plugin, dtype, flags.pins_of(tactic), model)
    options = BuildOptions(
        dtype, weights, device, max_batch_size, max_num_tokens, max_seq_len, pins=pins, cache_dir=cache_dir,
        kv_cache_dtype=kv_cache_dtype, task=task,
    )  # fmt: skip
    check_lengths(max_input_len, model, options)
    _report(*_built(model, options, output_dir, verify), as_json)


def _built(model: Path, options: BuildOptions, output: Path | None, verify: bool) -> tuple[Path, Progress]:
    from penstock.compiler.build import build as compile_model
    from penstock.engine import store

    if output is not None and store.is_engine(output):
        say(f"{output} holds an engine: it is replaced, unless it is this very build")
    with Progress() as progress:
        target = compile_model(model, options, output, progress)
    if verify and "cached" in progress.stages:
        from penstock.cli.verify import verify_weights

        verify_weights(target, model, options.weights)
        say("verified: every weight of the engine is what its checkpoint gives now")
    return target, progress


def _report(target: Path, progress: Progress, as_json: bool) -> None:
    from penstock.engine import store

    engine = store.load(target)
    cached = "cached" in progress.stages
    if not as_json:
        what = "found built" if cached else "built"
        say(f"{what}: {amount(engine.weight_bytes)} of weights in {engine.format} for {engine.device.name}")
        result(str(target))
        return
    facts: Mapping[str, Any] = {
        "engine": str(target), "cached": cached, "seconds": dict(engine.build_seconds), "format": engine.format,
        "device": engine.device.name, "weight_bytes": engine.weight_bytes, "profile": engine.profile.to_json(),
    }  # fmt: skip
    result_json(facts)


def check_classic(paged_kv_cache: str, use_inflight_batching: bool) -> None:
    """Flags with one meaning here. Raises OptionError for another."""
    if paged_kv_cache not in ON:
        raise OptionError(
            f"--paged_kv_cache {paged_kv_cache}: the KV cache is always paged; give enable, or leave it out"
        )
    if use_inflight_batching:
        say("--use_inflight_batching: a request joins and leaves at any step, always")


def check_lengths(max_input_len: int | None, model: Path, options: BuildOptions) -> None:
    """A prompt's limit is that of the whole request. Raises OptionError where it could not be reached."""
    if max_input_len is None:
        return
    from penstock.kernels.device import detect
    from penstock.models.directory import ModelDirectory

    max_seq_len = options.profile(ModelDirectory.open(model).spec, detect(options.device)).max_seq_len
    if not 1 <= max_input_len < max_seq_len:
        raise OptionError(
            f"--max_input_len {max_input_len} leaves no room within max_seq_len {max_seq_len}, which counts prompt "
            f"and output; give at least 1, and less than max_seq_len"
        )
    say(f"--max_input_len {max_input_len}: no limit of its own; a prompt may take all of max_seq_len but one token")


def restrict(plugin: str, dtype: str, pins: Mapping[str, str], model: Path) -> tuple[Mapping[str, str], str]:
    """What --gemm_plugin means: the pins and the dtype with it. Raises OptionError where they contradict each other."""
    if plugin not in GEMM_PLUGINS:
        raise OptionError(f"--gemm_plugin {plugin} is not one of {', '.join(GEMM_PLUGINS)}")
    if plugin == "fp8":
        raise UnsupportedError(
            "--gemm_plugin fp8 is not built yet: products in fp8 need quantised weights; "
            "use auto, with dtype bfloat16 or float16"
        )
    if plugin == "auto":
        return pins, dtype
    if plugin != "disable":
        return pins, _plugin_dtype(plugin, dtype, model)
    for op, name in VENDOR.items():
        if pins.get(op) == name:
            raise OptionError(
                f"--tactic {op}={name} is the library that --gemm_plugin disable leaves out; drop one of them"
            )
    say("--gemm_plugin disable: the vendor's products do not compete, our own kernels alone")
    return {**{op: f"!{name}" for op, name in VENDOR.items()}, **pins}, dtype


def _plugin_dtype(plugin: str, dtype: str, model: Path) -> str:
    """The classic plugin names the engine's type. Nothing is converted because of it alone."""
    from penstock.compiler.options import FORMATS
    from penstock.models.directory import ModelDirectory

    config = ModelDirectory.open(model).config
    stated = str(dtype if dtype != "auto" else config.get("dtype") or config.get("torch_dtype"))
    if FORMATS.get(stated) != FORMATS[plugin]:
        whose = "--dtype" if dtype != "auto" else "the checkpoint"
        raise OptionError(
            f"--gemm_plugin {plugin}, but {whose} says {stated}; give --dtype {plugin} too, or --gemm_plugin auto"
        )
    say(f"--gemm_plugin {plugin}: the engine computes in {plugin}; which implementation runs is timed, as always")
    return plugin
