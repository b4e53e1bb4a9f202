"""`penstock generate`: one prompt, streamed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, result_json, say
from penstock.cli.session import defaults_of, open_llm, say_rate, stream
from penstock.errors import PromptError

if TYPE_CHECKING:
    from penstock.runtime.requests import RequestOutput


def generate(
    model: flags.Model = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Default: what stdin holds.")
    ] = None,
    max_tokens: flags.MaxTokens = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    stop: flags.Stop = None,
    weights: flags.Weights = "checkpoint",
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    max_gpu_bytes: flags.GpuBytes = None,
    cache_dir: flags.CacheDir = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Generate text: streamed to stdout, or printed whole with --json."""
    from penstock.runtime.requests import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ())
    )
    text = _prompt(prompt)
    flags.load_plugins(plugin)
    arguments: dict[str, Any] = {
        "weights": weights, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "cache_dir": cache_dir, "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes,
    }  # fmt: skip
    with open_llm(model, Progress(), **arguments) as llm:
        for line in defaults_of(llm, params):
            say(f"sampling: {line}")
        if as_json:
            result_json(_facts(output := llm.generate(text, params)[0]))
        else:
            output = stream(llm, text, params)
        say_rate(output)


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise PromptError("there is no prompt; give -p TEXT, or pipe it in")
    text = sys.stdin.read() if given is None else given
    if not text:
        raise PromptError("the prompt is empty; give at least one character with -p TEXT, or pipe it in")
    return text


def _facts(output: RequestOutput) -> dict[str, Any]:
    done, metrics = output.outputs[0], output.metrics
    return {
        "prompt": output.prompt, "prompt_token_ids": list(output.prompt_token_ids), "text": done.text,
        "token_ids": list(done.token_ids), "finish_reason": done.finish_reason, "stop_reason": done.stop_reason,
        "time_to_first_token": metrics.time_to_first_token, "latency": metrics.latency,
    }  # fmt: skip
