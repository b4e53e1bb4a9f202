"""The classic benchmark as a class: its records, its sampling, and what it says about what is not applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from penstock.bench import LatencyBenchmark
from penstock.errors import OptionError, PromptError


@pytest.fixture(scope="module")
def benchmark(tiny_engine: Path) -> Iterator[LatencyBenchmark]:
    with LatencyBenchmark(str(tiny_engine), device="cpu") as made:
        yield made


def test_one_run_gives_a_token_and_its_time(benchmark: LatencyBenchmark) -> None:
    tokens, ms = benchmark.infer(5, [1, 2, 3, 4, 5])
    assert len(tokens) == 1 and 0 < ms < 60_000
    with pytest.raises(PromptError, match=r"2 ids were given for seq_len=5"):
        benchmark.infer(5, [1, 2])


def test_first_tokens_by_length(benchmark: LatencyBenchmark) -> None:
    records = benchmark.benchmark_ttft([3, 17], iterations=3)
    assert [r.prompt_length for r in records] == [3, 17] and all(r.iterations == 3 for r in records)
    assert all(0 < r.min_ms <= r.mean_ms <= r.max_ms and r.std_ms >= 0 for r in records)
    assert [f.name for f in fields(records[0])] == [
        "prompt_length", "mean_ms", "std_ms", "min_ms", "max_ms", "iterations",
    ]  # fmt: skip


def test_percentiles_by_length(benchmark: LatencyBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1e9, 1e9, 1e9, *map(float, range(100))])  # the first three warm up and do not count
    monkeypatch.setattr(LatencyBenchmark, "infer", lambda *_: ((1,), next(times)))
    (record,) = benchmark.benchmark_p99([4])
    assert (record.p50_ms, record.p95_ms, record.p99_ms, record.mean_ms) == (50, 94, 98, 49.5)
    assert record.iterations == 100 and record.std_ms == pytest.approx(28.866, abs=1e-3)


def test_what_cannot_be_measured_is_refused_before_a_run(
    benchmark: LatencyBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatencyBenchmark, "infer", lambda *_: pytest.fail("it ran"))
    with pytest.raises(OptionError, match=r"prompt length 300 cannot be measured: 301 tokens a request exceed"):
        benchmark.benchmark_ttft([3, 300])
    with pytest.raises(OptionError, match="at least one token"):
        benchmark.benchmark_p99([0])
    with pytest.raises(OptionError, match="prompt_lengths is empty"):
        benchmark.benchmark_ttft([])
    with pytest.raises(OptionError, match="iterations=0"):
        benchmark.benchmark_ttft([3], iterations=0)


def test_every_prompt_is_sampled_in_the_classic_way(
    benchmark: LatencyBenchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = benchmark._opened.llm.stats()["controlled_steps"]
    benchmark.benchmark_ttft([2], 1)
    assert benchmark._opened.llm.stats()["controlled_steps"] > before
    params = benchmark._params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.7, 0.9, 50, 1)
    assert params.repetition_penalty == 1.1
