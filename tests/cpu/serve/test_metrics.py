"""What /metrics says: its names, and its numbers after a run that is known."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.errors import ExecutorError, QueueFullError
from penstock.serve.guard import ClientGone
from penstock.serve.live import Live
from penstock.serve.metrics import TABLE, Histogram, Metrics
from penstock.serve.routes import metrics as routes
from penstock.serve.serving import Answered, Hooks
from penstock.serve.watch import Watch
from penstock.serve.wire import Beat, Part, Submit, Times
from tests.cpu.serve.doubles import StillEngine, app_of, client_of

GOLDEN = Path(__file__).with_name("metrics.golden.txt")


class Run:
    """A server's metrics over an engine that says what it is told to."""

    def __init__(self) -> None:
        self.engine = StillEngine()
        self.live = Live(self.engine)
        self.metrics = Metrics(self.live, lambda: "bundled")
        self.hooks = Hooks()
        Watch(self.metrics).join(self.hooks)

    def beat(self, at: float, **stats: Any) -> None:
        self.engine.beat = Beat(at, stats.get("steps", 0), at, True, stats)
        self.live.look()

    def start(self, arrival: float, max_tokens: int | None = None, **params: Any) -> Any:
        assert self.hooks.started is not None
        return self.hooks.started("r", Submit("cmpl-1", [5, 6, 7], params, arrival), max_tokens, [])

    def samples(self) -> dict[str, float]:
        """By name and labels besides the model's."""
        found = {}
        for family in self.metrics.collect():
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
                assert sample.labels["model_name"] == "bundled"
                found[sample.name.removeprefix("penstock:") + _said(labels)] = sample.value
        return found


def _said(labels: dict[str, str]) -> str:
    return "{" + ",".join(f"{name}={value}" for name, value in sorted(labels.items())) + "}" if labels else ""


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A monotonic clock that stands where it is set."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    made = Clock()
    monkeypatch.setattr("penstock.serve.watch.time", made)
    return made


def test_the_names_are_those_of_the_table(run: Run, update_golden: bool) -> None:
    """Dashboards and alerts hold on to names, labels and buckets: a change is to be seen in review."""
    lines = []
    for name, row in TABLE.items():
        labels = ",".join(("model_name", *row.labels))
        buckets = f" [{' '.join(f'{bound:g}' for bound in row.buckets)}]" if row.buckets else ""
        lines += [f"penstock:{name}{{{labels}}} {row.kind}{buckets}", f"    {row.help}"]
    found = "\n".join(lines) + "\n"
    if update_golden:
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text()
    exposed = {family.name for family in run.metrics.collect()}
    assert exposed == {f"penstock:{name.removesuffix('_total')}" if row.kind == "counter" else f"penstock:{name}"
                       for name, row in TABLE.items()}  # fmt: skip


def test_names_of_the_public_surface_are_there() -> None:
    asked = """time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds num_requests_running
    num_requests_waiting kv_cache_usage_perc prefix_cache_hits_total num_preemptions_total request_success_total
    prompt_tokens_total generation_tokens_total gpu_busy_ratio steps_off_fast_path_total step_roof_share"""
    assert set(asked.split()) <= TABLE.keys()


def test_times_and_sizes_say_their_unit() -> None:
    units = {"seconds": "Seconds", "ratio": "Share", "share": "0 to 1", "perc": "Share", "tokens": "Tokens"}
    for name, row in TABLE.items():
        unit = name.removesuffix("_total").rpartition("_")[2]
        assert units.get(unit, "") in row.help, name
        assert row.help.endswith("."), name


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_prometheus_own_parser_reads_it(run: Run, accept: str) -> None:
    run.start(time.monotonic()).parts([Part("cmpl-1", 0, [5, 6])])
    app = app_of(*routes.endpoints(run.metrics), api_keys=("a-key-for-tests",))

    async def read(key: str) -> Any:
        async with client_of(app, **{"x-api-key": key, "accept": accept}) as client:
            return await client.get("/metrics")

    response = asyncio.run(read("a-key-for-tests"))
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = [*text_string_to_metric_families(response.text)]
    assert len(families) == len(TABLE)
    assert all(family.documentation for family in families)
    assert "penstock:generation_tokens_total{model_name=\"bundled\"} 2.0" in response.text  # fmt: skip
    assert asyncio.run(read("wrong")).status_code == 401


def test_a_known_request(run: Run, clock: Any) -> None:
    """Arrived at 10, its first step at 12, three tokens at 13, 14 and, two at once, 18."""
    request = run.start(10.0, max_tokens=4)
    clock.now = 13.0
    request.parts([Part("cmpl-1", 0, [1])])
    clock.now = 14.0
    request.parts([Part("cmpl-1", 0, [2])])
    clock.now = 18.0
    request.parts([Part("cmpl-1", 0, [3, 4], "length", times=Times(10.0, 12.9, 17.9, 12.0, 2, 1))])
    clock.now = 20.0
    request.ended()
    found = run.samples()
    sums = {name: found[f"{name}_sum"] for name, row in TABLE.items() if f"{name}_sum" in found}
    assert sums == {
        "time_to_first_token_seconds": 3.0,
        "inter_token_latency_seconds": 5.0,
        "request_time_per_output_token_seconds": pytest.approx(5 / 3),
        "e2e_request_latency_seconds": 10.0,
        "request_queue_time_seconds": 2.0,
        "request_prefill_time_seconds": pytest.approx(0.9),
        "request_decode_time_seconds": pytest.approx(5.0),
        "request_inference_time_seconds": pytest.approx(5.9),
        "request_prompt_tokens": 3,
        "request_generation_tokens": 4,
        "request_prefill_kv_computed_tokens": 1,
        "request_params_n": 1,
        "request_params_max_tokens": 4,
        "request_num_preemptions": 1,
    }
    counts = {name: found[f"{name}_count"] for name in sums}
    assert counts == {**dict.fromkeys(sums, 1), "inter_token_latency_seconds": 3}
    between = {bound: found[f"inter_token_latency_seconds_bucket{{le={bound}}}"] for bound in ("0.75", "1.0", "2.5")}
    assert between == {"0.75": 0, "1.0": 1, "2.5": 3}, "of two that came at once each waited half"
    assert found["request_success_total{finished_reason=length}"] == 1
    assert found["request_success_total{finished_reason=stop}"] == 0
    assert (found["prompt_tokens_total"], found["generation_tokens_total"]) == (3, 4)


def test_texts_are_told_apart(run: Run, clock: Any) -> None:
    """Of the second this process found a stop string: the engine says no more of it."""
    request = run.start(0.0, n=2)
    for clock.now, index in ((1.0, 0), (2.0, 1), (4.0, 0)):
        request.parts([Part("cmpl-1", index, [7])])
    request.parts([Part("cmpl-1", 0, [], "length", times=Times(0.0, 1.0, 4.0, 0.5, 2))])
    request.ended(None, {1: "stop"})
    found = run.samples()
    assert (found["inter_token_latency_seconds_count"], found["inter_token_latency_seconds_sum"]) == (1, 3.0)
    assert found["time_to_first_token_seconds_count"] == 1
    assert found["request_params_n_sum"] == 2
    assert found["request_prefill_kv_computed_tokens_sum"] == 3 - 2
    assert found["request_success_total{finished_reason=stop}"] == 1
    assert found["request_success_total{finished_reason=length}"] == 1


def test_what_ends_badly_is_counted_by_its_reason(run: Run) -> None:
    full = QueueFullError("request 'x' is refused: ... the limit is max_num_queued_tokens=3; try again later")
    for error in (full, ExecutorError("a step failed"), asyncio.CancelledError(), ClientGone()):
        run.start(time.monotonic()).ended(error)
    found = run.samples()
    assert found["request_success_total{finished_reason=error}"] == 2
    assert found["request_success_total{finished_reason=abort}"] == 2
    assert found["admission_rejections_total{reason=max_num_queued_tokens}"] == 1
    assert found["e2e_request_latency_seconds_count"] == 3, "of what was not let in there is no latency"


def test_http_requests_have_few_labels_whatever_comes(run: Run) -> None:
    for method, route, status in (("GET", "/health", 200), ("BREW", "", 404), ("PUT", "", 404), ("POST", "/v1/x", 0)):
        run.hooks.answered[0](Answered("r", method, route, status, 0.0, 0.5, not status))
    run.hooks.answered[0](Answered("r", "POST", "/v1/x", 503, 0.0, 0.5, False))
    found = run.samples()
    assert found["http_requests_total{method=other,path=unknown,status=404}"] == 1
    assert found["http_requests_total{method=POST,path=/v1/x,status=499}"] == 1
    assert found["http_request_duration_seconds_sum{method=POST,path=/v1/x}"] == 1.0
    assert found["admission_rejections_total{reason=engine_unready}"] == 1


def test_gauges_are_those_of_the_newest_beat(run: Run) -> None:
    run.beat(100.0, steps=10, device_seconds=1.0, roof_seconds=0.4, generated_tokens=50)
    run.beat(
        101.0, steps=20, device_seconds=1.5, roof_seconds=0.8, generated_tokens=80, requests_running=4,
        requests_waiting=2, kv_cache_usage=0.25, kv_cache_waste=0.1, kv_blocks=64, prefix_cache_hits=16,
    )  # fmt: skip
    found = run.samples()
    assert [found[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")] == [
        4, 2, 0.25,
    ]  # fmt: skip
    assert found["gpu_busy_ratio"] == pytest.approx(0.5)
    assert found["step_roof_share"] == pytest.approx(0.8)
    assert run.live.tokens_per_second == pytest.approx(30)
    assert (found["prefix_cache_hits_total"], found["steps_total"]) == (16, 20)
    assert found["engine_state{state=ready}"] == 1
    assert found["build_info{device=cpu,dtype=float32,version=0.1.0}"] == 1


def test_where_the_roof_is_unknown_no_share_is_told(run: Run) -> None:
    run.beat(100.0, steps=1, device_seconds=1.0, roof_seconds=None)
    run.beat(101.0, steps=2, device_seconds=2.0, roof_seconds=None)
    assert "step_roof_share" not in run.samples()
    assert run.live.answer()["roof_known"] is False


@pytest.mark.parametrize("seen_dead", [True, False])
def test_counters_go_on_over_restarts(run: Run, seen_dead: bool) -> None:
    """Whether or not somebody looked while there was no engine."""
    run.beat(100.0, steps=10, preemptions=3, requests_running=2)
    if seen_dead:
        run.engine.state = "restarting"
        run.live.look()
        assert run.samples()["steps_total"] == 10
        assert run.samples()["num_requests_running"] == 0
        run.engine.state = "ready"
    run.engine.restarts = 1
    run.beat(110.0, steps=4, preemptions=1)
    run.beat(110.2, steps=12, preemptions=1)
    found = run.samples()
    assert (found["steps_total"], found["num_preemptions_total"], found["engine_restarts_total"]) == (22, 4, 1)
    assert run.live.tokens_per_second == 0


def test_rates_forget(run: Run) -> None:
    """The window moves on, and an idle engine comes to rest."""
    run.beat(100.0, steps=1, generated_tokens=0)
    run.beat(101.0, steps=9, generated_tokens=100)
    assert run.live.tokens_per_second == 100
    for at in (102.0, 103.0, 104.0):
        run.beat(at, steps=9, generated_tokens=100)
    assert run.live.tokens_per_second == 0


def test_a_value_on_a_bound_is_in_its_bucket() -> None:
    histogram = Histogram((1, 2))
    for value in (1, 1.5, 2, 9):
        histogram.observe(value)
    assert histogram._counts == [1, 2, 1]


def test_watching_costs_little(run: Run) -> None:
    """20,000 tokens a second leave 50 us each on one core: watching them is to take a small part of it. The best of
    some rounds, for other work may take the core away."""
    request, part = run.start(0.0), [Part("a", 0, [5])]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(2000):
            request.parts(part)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 3e-6


def test_deployed_files_ask_for_names_there_are() -> None:
    deploy = Path(__file__).parents[3] / "deploy"
    asked = set(re.findall(r"penstock:([a-z]\w+)", "".join(path.read_text() for path in deploy.rglob("*.*"))))
    ends = "_(bucket|sum|count)$"
    assert asked and {name if name in TABLE else re.sub(ends, "", name) for name in asked} <= TABLE.keys()
