"""`penstock generate`: one prompt, streamed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, result, result_json, say
from penstock.cli.session import defaults_of, open_llm, say_rate, stream
from penstock.cli.texts import facts, guided, numbered, sampling, scores, seconds
from penstock.errors import PromptError

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.runtime.requests import RequestOutput, SamplingParams


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
    n: flags.Texts = None,
    beams: flags.Beams = None,
    length_penalty: flags.LengthPenalty = None,
    min_tokens: flags.MinTokens = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    no_repeat_ngram_size: flags.NoRepeat = None,
    bad_words: flags.BadWords = None,
    logprobs: flags.Logprobs = None,
    guided_json: flags.GuidedJson = None,
    guided_regex: flags.GuidedRegex = None,
    guided_choice: flags.GuidedChoice = None,
    timeout: flags.Timeout = None,
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
    """Generate text: streamed to stdout; printed whole with --json, or where there are several texts."""
    params = sampling(
        n, beams, length_penalty, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop=stop, min_tokens=min_tokens, min_p=min_p, repetition_penalty=repetition_penalty, logprobs=logprobs,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, bad_words=bad_words,
        no_repeat_ngram_size=no_repeat_ngram_size, guided_decoding=guided(guided_json, guided_regex, guided_choice),
    )  # fmt: skip
    limit, text = seconds("--timeout", timeout), _prompt(prompt)
    arguments: dict[str, Any] = {
        "weights": weights, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "cache_dir": cache_dir, "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes,
    }  # fmt: skip
    with open_llm(model, Progress(), **arguments) as llm:
        for line in defaults_of(llm, params):
            say(f"sampling: {line}")
        if as_json:
            result_json(_facts(llm, output := llm.generate(text, params, timeout=limit)[0]))
        else:
            output = _shown(llm, text, params, limit)
        say_rate(output)


def _shown(llm: LLM, text: str, params: SamplingParams, timeout: float | None) -> RequestOutput:
    """One text as it comes, several when all have ended; their tokens' log-probabilities behind them."""
    if params.n > 1:
        output = llm.generate(text, params, timeout=timeout)[0]
        for line in numbered(output.outputs, llm.tokenizer):
            result(line)
        return output
    output = stream(llm, text, params, timeout)
    for done in output.outputs:
        if table := scores(done, llm.tokenizer):
            result(table)
    return output


def _prompt(given: str | None) -> str:
    if given is None and sys.stdin.isatty():
        raise PromptError("there is no prompt; give -p TEXT, or pipe it in")
    text = sys.stdin.read() if given is None else given
    if not text:
        raise PromptError("the prompt is empty; give at least one character with -p TEXT, or pipe it in")
    return text


def _facts(llm: LLM, output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    return {
        "prompt": output.prompt, "prompt_token_ids": list(output.prompt_token_ids), **facts(output, llm.tokenizer),
        "time_to_first_token": metrics.time_to_first_token, "latency": metrics.latency,
        "queue_time": metrics.queue_time, "prefill_time": metrics.prefill_time, "decode_time": metrics.decode_time,
        "reused_tokens": metrics.reused_tokens, "preemptions": metrics.preemptions,
    }  # fmt: skip
