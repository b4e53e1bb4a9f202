"""Decode rate, time to first token and prefill rate of a running engine, by the workload's definitions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from penstock.bench.workload import TTFT_LENGTHS, percentile, prompt
from penstock.llm import LLM
from penstock.runtime.requests import SamplingParams

PROMPT = 128  # tokens of a decode benchmark's prompts
NEW = 256  # tokens each of them generates


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second, and half the spread of the repeats."""

    value: float
    spread: float


def settle(llm: LLM, patience: float = 60.0) -> None:
    """Wait until every bucket is captured, as a service that has idled for seconds is."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        stats = llm.stats()
        if stats.get("buckets_captured", 0) == stats.get("buckets", 0):
            return
        time.sleep(0.05)


def run(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, temperature: float = 0.0) -> float:
    """Seconds for all prompts to generate so many tokens each, without detokenising."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return time.perf_counter() - start


def decode_rate(llm: LLM, batch: int, repeats: int = 3) -> Rate:
    """batch * (256 - 1) / (time of 256 new tokens - time of 1), prompts of 128; the median of the repeats."""
    prompts = [prompt(PROMPT, i) for i in range(batch)]
    run(llm, prompts, 8)
    rates = sorted(batch * (NEW - 1) / (run(llm, prompts, NEW) - run(llm, prompts, 1)) for _ in range(repeats))
    return Rate(rates[len(rates) // 2], (rates[-1] - rates[0]) / 2)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Milliseconds: the mean over prompt lengths of the mean, and of the 99th percentile, at each."""

    mean_ms: float
    p99_ms: float


def first_token(llm: LLM, samples: int = 30) -> FirstToken:
    """Time to first token, sampled at temperature 0.7, over prompts of 10, 50, 100 ... 400 tokens."""
    for seed in range(3):
        run(llm, [prompt(100, seed)], 1, 0.7)
    by_length = [[run(llm, [prompt(n, i)], 1, 0.7) * 1e3 for i in range(samples)] for n in TTFT_LENGTHS]
    return FirstToken(mean(map(mean, by_length)), mean(percentile(x, 99) for x in by_length))


def prefill_rate(llm: LLM, count: int = 64, length: int = 2048) -> Rate:
    """count * length / time of so many prompts with one new token each; the median of three."""
    prompts = [prompt(length, i) for i in range(count)]
    run(llm, prompts[:4], 1)
    rates = sorted(count * length / run(llm, prompts, 1) for _ in range(3))
    return Rate(rates[1], (rates[2] - rates[0]) / 2)
