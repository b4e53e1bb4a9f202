"""Decode rate, time to first token and prefill rate of a running engine, by the workload's definitions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, pstdev
from typing import Any

from penstock.bench.workload import TTFT_LENGTHS, VOCAB, percentile, prompt
from penstock.errors import ExecutorError, OptionError
from penstock.llm import LLM
from penstock.runtime.requests import SamplingParams

PROMPT = 128  # tokens of a decode benchmark's prompts
NEW = 256  # tokens each of them generates
WARM_UP = 3  # first tokens that are not counted, at each length


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens a second, and half the spread of the repeats."""

    value: float
    spread: float


@dataclass(frozen=True, slots=True)
class Samples:
    """Milliseconds to the first token of prompts of one length."""

    length: int
    ms: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.ms)

    @property
    def std(self) -> float:
        return pstdev(self.ms)

    def percentile(self, q: float) -> float:
        return percentile(self.ms, q)


def settle(llm: LLM, patience: float = 60.0) -> None:
    """Wait until every bucket is captured, as a service that has idled for seconds is.

    Raises ExecutorError where that takes longer: what is timed between captures says nothing.
    """
    stats: dict[str, Any] = {}
    end = time.monotonic() + patience
    while not stats or time.monotonic() < end:
        stats = llm.stats()
        if stats.get("buckets_captured", 0) == stats.get("buckets", 0):
            return
        time.sleep(0.05)
    raise ExecutorError(
        f"{stats['buckets_captured']} of {stats['buckets']} buckets are captured after {patience:.0f} s; close what "
        "else uses the device, or build for a lower max_num_tokens"
    )


def run(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, temperature: float = 0.0) -> float:
    """Seconds for all prompts to generate so many tokens each, without detokenising."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    return time.perf_counter() - start


def decode_rate(llm: LLM, batch: int, repeats: int = 3, vocab: int = VOCAB, new: int = NEW) -> Rate:
    """batch * (new - 1) / (time of `new` tokens - time of 1), prompts of 128; the median of the repeats.

    Raises OptionError where those times are too close to each other to be subtracted.
    """
    prompts = [prompt(PROMPT, i, vocab) for i in range(batch)]
    run(llm, prompts, 8)
    times = [(run(llm, prompts, new), run(llm, prompts, 1)) for _ in range(repeats)]
    return rate_of(times, batch, new)


def rate_of(times: Sequence[tuple[float, float]], batch: int, new: int) -> Rate:
    """From pairs of seconds, of `new` tokens and of 1. Raises OptionError where a difference is not more than noise.

    Noise is how far apart the times of 1 token are.
    """
    ones = [one for _, one in times]
    least, noise = min(many - one for many, one in times), max(ones) - min(ones)
    if least <= noise:
        raise OptionError(
            f"--new_tokens {new}: {new} tokens took {least * 1e3:.2f} ms longer than one, whose own times differ by "
            f"{noise * 1e3:.2f} ms: that is no rate; give more, like {NEW}"
        )
    rates = [batch * (new - 1) / (many - one) for many, one in times]
    return Rate(median(rates), (max(rates) - min(rates)) / 2)


def first_tokens(
    llm: LLM, samples: int, lengths: Sequence[int] = TTFT_LENGTHS, vocab: int = VOCAB
) -> tuple[Samples, ...]:
    """Time to first token, sampled at temperature 0.7, at each prompt length."""
    return tuple(_first(llm, length, samples, vocab) for length in lengths)


def _first(llm: LLM, length: int, samples: int, vocab: int) -> Samples:
    for seed in range(WARM_UP):
        run(llm, [prompt(length, samples + seed, vocab)], 1, 0.7)
    return Samples(length, tuple(run(llm, [prompt(length, i, vocab)], 1, 0.7) * 1e3 for i in range(samples)))


def prefill_rate(llm: LLM, count: int = 64, length: int = 2048, vocab: int = VOCAB) -> Rate:
    """count * length / time of so many prompts with one new token each; the median of three."""
    prompts = [prompt(length, i, vocab) for i in range(count)]
    run(llm, prompts[:4], 1)
    rates = [count * length / run(llm, prompts, 1) for _ in range(3)]
    return Rate(median(rates), (max(rates) - min(rates)) / 2)
