"""What a peer's process is asked and answers: JSON on its command line, one line of JSON at the end of its output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from penstock.bench.workload import percentile, prompt
from penstock.errors import OptionError

MARK = "PEER "  # begins the line that holds the answer, whatever libraries print around it
WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Task:
    """`model`: a directory with a config; the weights are random. `vocab`: the largest token id of a prompt."""

    way: str
    model: str
    dtype: str  # as torch spells it: bfloat16
    device: str
    lengths: tuple[int, ...]
    samples: int
    prompt: int
    new: int
    vocab: int

    @staticmethod
    def parse(text: str) -> Task:
        data = json.loads(text)
        return Task(**{**data, "lengths": tuple(data["lengths"])})

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(max(self.lengths) + 1, self.prompt + self.new)


@dataclass(frozen=True, slots=True)
class Answer:
    """Milliseconds, tokens a second, GB; or why there is none. `version`: of the peer."""

    ttft_ms: float = 0.0
    p99_ms: float = 0.0
    tokens_per_s: float = 0.0
    memory_gb: float = 0.0
    version: str = ""
    refused: str = ""


def first_tokens(task: Task, first: Callable[[list[int]], object]) -> tuple[float, float]:
    """(mean, mean over the lengths of the P99) in milliseconds; `first` returns once the token is known."""
    means, tails = [], []
    for length in task.lengths:
        for seed in range(WARM_UP):
            first(prompt(length, task.samples + seed, task.vocab))
        times = [_milliseconds(first, prompt(length, i, task.vocab)) for i in range(task.samples)]
        means.append(mean(times))
        tails.append(percentile(times, 99))
    return mean(means), mean(tails)


def decode_rate(task: Task, generate: Callable[[list[int], int], object]) -> float:
    """(new - 1) / (time of `new` tokens - time of 1), one prompt; `generate` returns once all tokens are there.

    Raises OptionError where that difference is not more than what two times of 1 token differ by.
    """
    ids = prompt(task.prompt, 0, task.vocab)
    generate(ids, min(8, task.new))
    one, other = sorted(_milliseconds(generate, ids, 1) for _ in range(2))
    longer = _milliseconds(generate, ids, task.new) - one
    if longer <= other - one:
        raise OptionError(f"{task.new} new tokens take hardly longer than one: no rate; give more with --new_tokens")
    return (task.new - 1) / longer * 1e3


def _milliseconds(work: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return (time.perf_counter() - start) * 1e3


def serve(measure: Callable[[Task], Answer], words: Sequence[str] | None = None) -> None:
    """Answer the task on the command line. A failure is an answer too: this is the process's border."""
    try:
        answer = measure(Task.parse((sys.argv[1:] if words is None else words)[0]))
    except Exception as error:
        answer = Answer(refused=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    print(MARK + json.dumps(asdict(answer)), flush=True)
