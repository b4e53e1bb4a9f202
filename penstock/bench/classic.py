"""The classic benchmark as a class: first tokens of random prompts, by length."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from types import TracebackType
from typing import Any, Final

from penstock.bench.latency import settle
from penstock.bench.subject import find, open_subject
from penstock.bench.workload import percentile
from penstock.errors import OptionError, PromptError
from penstock.runtime.requests import SamplingParams

LOWEST_ID, HIGHEST_ID = 1, 1000  # of the random prompts, where the vocabulary has them
WARM_UP = 3  # runs at each length that are not counted
SAMPLING: Final[dict[str, Any]] = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}


@dataclass(frozen=True, slots=True)
class Ttft:
    """Milliseconds to the first token."""

    prompt_length: int
    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    iterations: int


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds to the first token, by nearest rank."""

    prompt_length: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_ms: float
    std_ms: float
    iterations: int


class LatencyBenchmark:
    """Times first tokens of a model: a directory, hub name, engine or workload's name; None: the bundled model.

    Keyword arguments are LLM's own. Use as a context manager, or call `close`. Every prompt is sampled by SAMPLING,
    whose penalty makes each step a controlled one.
    """

    def __init__(
        self, model_name: str | None = None, *, weights: str = "checkpoint", cache_dir: str | Path | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        folder = None if cache_dir is None else Path(cache_dir)
        subject = find(model_name, weights, folder)
        self._params = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False, **SAMPLING)
        self._opened = open_subject(subject, cache_dir=folder, **arguments)
        settle(self._opened.llm)

    def infer(self, seq_len: int, input_tokens: Sequence[int]) -> tuple[tuple[int, ...], float]:
        """The tokens sampled behind a prompt of `seq_len` ids, and the milliseconds that took.

        Raises PromptError where there are not so many ids.
        """
        if len(input_tokens) != seq_len:
            raise PromptError(f"{len(input_tokens)} ids were given for seq_len={seq_len}; give exactly that many")
        prompt = [{"prompt_token_ids": [int(token) for token in input_tokens]}]
        start = time.perf_counter()
        output = self._opened.llm.generate(prompt, self._params)[0]
        return output.outputs[0].token_ids, (time.perf_counter() - start) * 1e3

    def benchmark_ttft(self, prompt_lengths: Sequence[int], iterations: int = 5) -> list[Ttft]:
        """A record for each prompt length."""
        runs = self._measured(prompt_lengths, iterations)
        return [Ttft(n, mean(x), pstdev(x), min(x), max(x), iterations) for n, x in runs]

    def benchmark_p99(self, prompt_lengths: Sequence[int], iterations: int = 100) -> list[Percentiles]:
        """A record for each prompt length."""
        return [self._percentiles(n, x) for n, x in self._measured(prompt_lengths, iterations)]

    def _percentiles(self, length: int, ms: Sequence[float]) -> Percentiles:
        p50, p95, p99 = (percentile(ms, q) for q in (50, 95, 99))
        return Percentiles(length, p50, p95, p99, mean(ms), pstdev(ms), len(ms))

    def close(self) -> None:
        """Stop the runtime and free the device."""
        self._opened.llm.shutdown()

    def __enter__(self) -> LatencyBenchmark:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _measured(self, lengths: Sequence[int], iterations: int) -> list[tuple[int, list[float]]]:
        """Milliseconds at each length. Raises OptionError before any run, for no length or one that cannot be."""
        if not lengths:
            raise OptionError("prompt_lengths is empty: there is nothing to measure; give some like [10, 50, 100]")
        if iterations < 1:
            raise OptionError(f"iterations={iterations} is too small; give at least 1")
        for length in lengths:
            if length < 1 or (reason := self._opened.refusal(1, length + 1)):
                reason = "a prompt holds at least one token" if length < 1 else reason
                raise OptionError(f"prompt length {length} cannot be measured: {reason}; leave it out")
        return [(length, self._times(length, iterations)) for length in lengths]

    def _times(self, length: int, iterations: int) -> list[float]:
        highest = min(HIGHEST_ID, self._opened.engine.vocab_size - 1)
        numbers = random.Random(length)
        prompts = [[numbers.randint(LOWEST_ID, highest) for _ in range(length)] for _ in range(WARM_UP + iterations)]
        return [self.infer(length, ids)[1] for ids in prompts][WARM_UP:]
