"""`penstock chat`: a conversation by the model's own template; works from a pipe too, a line a turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, say
from penstock.cli.session import defaults_of, open_llm, say_rate, stream
from penstock.cli.texts import sampling
from penstock.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from penstock.llm import LLM
    from penstock.runtime.requests import SamplingParams
    from penstock.text import ChatTemplate

ANSWER = 256  # tokens of an answer where nothing is said: a completion's 16 would cut every sentence


def chat(
    model: flags.Model = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system message to begin with.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max_tokens", metavar="N", help="Most tokens of an answer.")] = ANSWER,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    no_repeat_ngram_size: flags.NoRepeat = None,
    dtype: flags.Dtype = "auto",
    kv_cache_dtype: flags.KvDtype = "auto",
    device: flags.Device = "auto",
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    max_gpu_bytes: flags.GpuBytes = None,
    cache_dir: flags.CacheDir = None,
    plugin: flags.Plugin = None,
) -> None:
    """Talk with a model. Ctrl-D leaves."""
    params = sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, no_repeat_ngram_size=no_repeat_ngram_size,
    )  # fmt: skip
    arguments: dict[str, Any] = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "device": device, "max_seq_len": max_seq_len,
        "cache_dir": cache_dir,
        "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes,
    }  # fmt: skip
    with open_llm(model, Progress(), **arguments) as llm:
        template = _template(llm)
        for line in defaults_of(llm, params):
            say(f"sampling: {line}")
        _converse(llm, template, params, [{"role": "system", "content": system}] if system else [])


def _template(llm: LLM) -> ChatTemplate:
    from penstock.text import ChatTemplate

    template = ChatTemplate.from_dir(llm.engine_dir)
    if template is None:
        raise TokenizerError(
            "the model has no chat template, so it was not made for conversation; use `penstock generate`"
        )
    return template


def _converse(llm: LLM, template: ChatTemplate, params: SamplingParams, start: list[dict[str, str]]) -> None:
    """Turn by turn. What cannot be asked is said; at a terminal the conversation then begins anew."""
    messages = list(start)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(llm, template, params, messages)})
        except InputError as error:
            if not sys.stdin.isatty():
                raise
            say(f"{error}; the conversation begins anew")
            messages = list(start)


def _answer(llm: LLM, template: ChatTemplate, params: SamplingParams, messages: list[dict[str, str]]) -> str:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(template.render(messages), add_special_tokens=False)
    output = stream(llm, {"prompt_token_ids": ids}, params)
    say_rate(output)
    return output.outputs[0].text


def _lines() -> Iterator[str]:
    """What is typed, or piped in; empty lines are skipped."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
