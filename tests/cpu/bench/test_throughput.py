"""`penstock bench throughput`: its requests, its roof by hand, what a run is told by, and the verb from end to end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.bench import plot, throughput
from penstock.bench.ideal import ideal
from penstock.bench.load import Session, Wish
from penstock.bench.records import Maker
from penstock.bench.requests import Asked, Given, parse, read_trace
from penstock.bench.result import Result, of_waits, over_static, over_uncached
from penstock.bench.roofs import attention_flops
from penstock.bench.subject import Opened, Subject, open_subject
from penstock.bench.throughput import Flow, flow, interrupted, quantile, waits
from penstock.bench.workload import MIXED, mixed_requests
from penstock.cli import main
from penstock.engine import store
from penstock.engine.device import CPU
from penstock.errors import OptionError
from penstock.kernels.roof import Roof
from penstock.runtime.steplog import LoggedStep
from tools.readme_tables import section

ROOF = Roof(read_bytes_per_s=1e9, flops_per_s=1e10)
FIGURE = Maker("tiny", "f32")


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Iterator[Opened]:
    with open_subject(Subject("tiny", str(tiny_engine), "checkpoint"), device="cpu") as model:
        yield model


def made(text: str, **given: Any) -> list[Asked]:
    (work,) = parse(text, Given(**given))
    return work.requests(299, lambda words: [len(word) for word in words.split()])


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_workload_is_the_same_every_time_and_within_its_lengths() -> None:
    requests = made("random", input_len=(3, 9), output_len=(2, 2), num_requests=50)
    assert requests == made("random", input_len=(3, 9), output_len=(2, 2), num_requests=50)
    assert {len(r.prompt) for r in requests} == set(range(3, 10)) and {r.new for r in requests} == {2}
    assert len({tuple(r.prompt) for r in requests}) == 50 and max(t for r in requests for t in r.prompt) <= 299
    assert [(r.prompt, r.new) for r in made("mixed")] == mixed_requests(MIXED, vocab=299)


def test_lognormal_outputs_have_their_median_and_their_cap() -> None:
    news = [r.new for r in made("lognormal:4000")]
    assert 58 <= median(news) <= 70 and max(news) == 2048 and min(news) >= 1
    assert news.count(2048) / 4000 == pytest.approx(0.0019, abs=0.002)  # beyond 2.9 sigma


def test_a_shared_prefix_is_everybodys_and_only_the_first_computes_it() -> None:
    requests = made("shared-prefix", prefix_len=20, num_requests=3)
    assert len({tuple(r.prompt[:20]) for r in requests}) == 1 and len({tuple(r.prompt[20:]) for r in requests}) == 3
    assert [r.shared for r in requests] == [0, 20, 20] and {len(r.prompt) for r in requests} == {84}


def test_arrivals_are_a_poisson_process_of_that_rate() -> None:
    times = [r.arrival for r in made("random", rate=4.0, num_requests=2000)]
    assert times[0] == 0 and times == sorted(times) and times[-1] == pytest.approx(500, rel=0.1)
    gaps = sorted(b - a for a, b in pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(0.25 * 0.693, rel=0.1)  # of an exponential, not of even steps


def test_several_workloads_with_counts_and_batches() -> None:
    works = parse("1000/1000:7, lognormal:5@64,mixed@8,shared-prefix", Given())
    assert [w.name for w in works] == ["offline_1000_1000", "lognormal", "throughput_mixed", "shared_prefix_2k"]
    assert [(w.given.num_requests, w.batch) for w in works] == [(7, None), (5, 64), (512, 8), (256, None)]
    assert parse("random", Given(input_len=(1, 9)))[0].name == "offline_1-9_128"


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        ("magic", {}, "'magic' is unknown; there are random, mixed"),
        ("mixed@0", {}, "'0' is no batch"),
        ("mixed:x", {}, "'x' is no number of requests"),
        ("12/", {}, "'' is neither a length from 1 nor LOW:HIGH"),
        ("mixed", {"input_len": (1, 2)}, "--input_len is not for the workload mixed, which takes --num_requests"),
        ("128/128", {"output_len": (1, 2)}, "--output_len is not for the workload random"),
        ("mixed,random", {"num_requests": 4}, "--num_requests: say of one workload"),
        ("random", {"num_requests": 0}, "--num_requests=0 must be above 0"),
        ("random", {"rate": float("inf")}, "--rate=inf must be above 0"),
        ("interrupted", {"rate": 1.0}, "--rate is not for the workload interrupted"),
        ("trace", {}, "needs --trace FILE"),
        ("trace", {"trace": Path("/nowhere")}, "/nowhere cannot be read"),
    ],
)
def test_what_is_no_workload_is_refused(text: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text, Given(**given))
    assert said in str(caught.value)


def test_a_trace_has_lengths_or_texts_and_times(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    lines = [{"prompt": "one and two", "output_tokens": 3, "arrival": 2}, {"prompt_tokens": 5, "output_tokens": 1}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = made("trace", trace=file)
    assert (len(first.prompt), first.new, first.arrival) == (5, 1, 0.0)
    assert (second.prompt, second.new, second.arrival) == ([3, 3, 3], 3, 2.0)
    assert len(made("trace", trace=file, num_requests=1)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "[1]", "{", '{"output_tokens": 3}', '{"prompt": "a", "prompt_tokens": 1, "output_tokens": 3}',
        '{"prompt_tokens": 0, "output_tokens": 3}', '{"prompt_tokens": 1}', '{"prompt": "", "output_tokens": 1}',
        '{"prompt_tokens": 1, "output_tokens": true}', '{"prompt_tokens": 1, "output_tokens": 1, "arrival": -1}',
        '{"prompt_tokens": 1, "output_tokens": 1, "temperature": 0}',
    ],
)  # fmt: skip
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(OptionError, match="line 2"):
        read_trace(file)


# --- the roof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1e10, 1e8])  # products bound by their bytes, and by their operations
def test_the_roof_of_a_workload_by_hand(tiny_engine: Path, rate: float) -> None:
    engine = store.load(tiny_engine)
    work = engine.work
    token, row, kv = work["flops_per_token"], work["flops_per_logit"], work["kv_bytes_per_token"]
    found = ideal(engine, Roof(1e9, rate), [Asked([1] * 6, 3), Asked([1] * 4, 1)], batch=2, reuse=True)
    prompts = sum(n * token + row + attention_flops(engine, n, 0) for n in (6, 4)) / rate
    products = max(work["weight_bytes"] / 1e9, (token + row) / rate)
    attentions = [max(n * kv / 1e9, attention_flops(engine, 1, n) / rate) for n in (7, 8)]
    assert found.serial == pytest.approx(prompts + 2 * products + sum(attentions))
    bytes_, operations = ([work["weight_bytes"] + n * kv for n in (7, 8)], [token + row] * 2)
    scores = [attention_flops(engine, 1, n) for n in (7, 8)]
    steps = [max(b / 1e9, (o + a) / rate) for b, o, a in zip(bytes_, operations, scores, strict=True)]
    assert found.overlapped == pytest.approx(prompts + sum(steps))


def test_at_most_so_many_run_at_once_and_a_found_prefix_costs_nothing(tiny_engine: Path) -> None:
    engine = store.load(tiny_engine)
    requests = [Asked([1] * 150, 9, shared=140 * (i > 0)) for i in range(4)]
    alone, both, reused = (ideal(engine, ROOF, requests, n, reuse) for n, reuse in ((1, False), (4, False), (4, True)))
    once = max(engine.work["weight_bytes"] / 1e9, 0)
    assert alone.serial - both.serial == pytest.approx(24 * once, rel=0.1)  # 32 steps instead of 8
    saved = 3 * (128 * engine.work["flops_per_token"] + attention_flops(engine, 128, 0)) / ROOF.flops_per_s
    read = 3 * 8 * 128 * engine.work["kv_bytes_per_token"] / 1e9
    assert both.serial - reused.serial == pytest.approx(saved + read, rel=0.02)


# --- runs -----------------------------------------------------------------------------------------------------------


def step(read: float, learnt: int, **more: Any) -> LoggedStep:
    return LoggedStep(**{"tokens": 1, "rows": 1, "logits": 1, "decoding": learnt, "launched": 0.0, **more},
                      learnt=learnt, read=read)  # fmt: skip


def test_waits_are_counted_once_for_each_request_that_learns_a_token() -> None:
    found = waits([step(1.0, 0), step(1.5, 3), step(3.5, 1), step(9.0, 0)])
    assert found == ((0.5, 3), (2.0, 1))
    assert [quantile(found, q) for q in (0, 50, 99, 100)] == [0.5, 0.5, 0.5, 2.0] and quantile((), 50) == 0.0
    assert quantile(((1.0, 99), (7.0, 2)), 99) == 7.0


def test_a_run_is_told_by_its_steps_and_requests(opened: Opened) -> None:
    requests = made("random", num_requests=9, input_len=(5, 40), output_len=(2, 12))
    it, loop = flow(opened.llm, requests), opened.llm._loop
    assert loop.executor.log is None and loop.executor.backend.timer is None
    assert it.output_tokens == sum(r.new for r in requests) == sum(s.learnt for s in it.steps) + len(requests)
    assert it.prompt_tokens == sum(len(r.prompt) for r in requests)
    assert sum(s.tokens for s in it.steps) == it.prompt_tokens + it.output_tokens - len(requests)
    assert max(s.rows for s in it.steps) == 4 and sum(count for _, count in it.waits) == sum(s.learnt for s in it.steps)
    assert 0 < it.busy < 1 and 0 < it.waste < 1 and it.host_us > 0 and it.preemptions == 0
    assert max(it.latencies) <= it.seconds and all(f <= w for f, w in zip(it.first_tokens, it.latencies, strict=True))
    assert all(a.read <= b.read and a.launched < a.read for a, b in pairwise(it.steps))


def test_requests_come_at_their_times(opened: Opened) -> None:
    it = flow(opened.llm, [Asked([5, 6, 7], 2), Asked([8, 9], 3, arrival=0.3)])
    first, second = it.outputs
    assert second.metrics.arrival - first.metrics.arrival > 0.29 and it.seconds > 0.3
    assert len(second.outputs[0].token_ids) == 3 and it.first_tokens[1] < it.seconds - 0.29  # from its own arrival


def test_a_refused_request_ends_the_others(opened: Opened) -> None:
    with pytest.raises(Exception, match="is empty"):
        flow(opened.llm, [Asked([5, 6, 7], 200), Asked([], 3, arrival=0.05)])
    assert opened.llm.stats()["requests_running"] == 0 and opened.llm._loop.executor.log is None


def test_prompts_beside_running_requests(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IDLE_STEPS", 10), ("LONG_PROMPTS", 3), ("RUNNING_PROMPT", 8)):
        monkeypatch.setattr(throughput, name, value)
    alone, beside = interrupted(opened.llm, 2, 60, 250, opened.vocab)
    assert [count for _, count in alone] == [2] * 10 and {count for _, count in beside} == {2}
    assert len(beside) >= 9  # three chunks of at most 22 tokens a prompt
    assert opened.llm.stats()["requests_running"] == 0
    with pytest.raises(OptionError, match="ended before 3 prompts of 60"):
        interrupted(opened.llm, 2, 60, 24, opened.vocab)


# --- results --------------------------------------------------------------------------------------------------------


def ran(kind: str, reuse: bool, first: float, seconds: float = 2.0) -> Result:
    (work,) = parse(kind, Given())
    times = SimpleNamespace(time_to_first_token=first, latency=seconds, reused_tokens=3)
    output = SimpleNamespace(prompt_token_ids=[1] * 4, outputs=[SimpleNamespace(token_ids=[1] * 10)], metrics=times)
    log = (step(1.0, 0, busy=0.5), step(1.5, 2, busy=1.0))
    run = Flow(seconds, (output, output), log, waits(log), 0.25, 7.0, 1)  # type: ignore[arg-type]  # what is read of it
    return Result(work, 8, reuse, run)


def test_a_result_as_records_and_as_a_row() -> None:
    result = ran("mixed", False, 0.5)
    found = {r.metric.removeprefix("throughput_mixed_bs8"): (r.value, r.unit) for r in result.records(FIGURE)}
    assert found[""] == (10.0, "tok/s") and found[".total"] == (14.0, "tok/s") and found[".busy"] == (75.0, "%")
    assert found[".ttft_p99_ms"] == (500.0, "ms") and found[".itl_p99_ms"] == (500.0, "ms")
    assert found[".reused"] == (75.0, "%") and found[".kv_waste"] == (25.0, "%") and found[".rows_per_step"][0] == 1
    assert result.cells()[0] == "throughput_mixed_bs8" and "75.0%" in result.cells() and result.share is None


def test_ratios_over_what_waits_and_over_what_computes_again() -> None:
    rate, ratio = over_static(FIGURE, ran("lognormal", False, 0.1), 2.5)
    assert (rate.metric, ratio.metric, ratio.value) == ("lognormal_bs8_static", "inflight_over_static_lognormal", 4.0)
    both = [ran("shared-prefix", False, 0.8), ran("shared-prefix", True, 0.1), ran("mixed", False, 1.0)]
    (ratio,) = over_uncached(FIGURE, both)
    assert ratio.metric == "shared_prefix_2k_ttft_ratio" and ratio.value == pytest.approx(8)
    assert not [*over_uncached(FIGURE, both[1:])] and both[0].name == "shared_prefix_2k_uncached"
    idle, loaded, times = of_waits(FIGURE, ((0.002, 8),), ((0.002, 90), (0.006, 10)), 2, 60)
    assert (idle.value, loaded.value, times.value) == (2.0, 6.0, 3.0) and "prompts of 60" in loaded.note


def test_workloads_are_grouped_by_how_the_model_must_be_open() -> None:
    wish = Wish(tuple(parse("mixed,lognormal@4,shared-prefix,mixed@9", Given())))
    session = Session(Subject("x", "x", "random"), {}, CPU, wish, lambda _: None)
    groups = {key: [w.name for w in works] for key, works in session._groups(8).items()}
    assert groups == {
        (8, False): ["throughput_mixed", "shared_prefix_2k"], (4, False): ["lognormal"],
        (8, True): ["shared_prefix_2k"],
    }  # fmt: skip
    assert session.left_out == {"throughput_mixed": "@9 exceeds max_batch_size=8"}


def test_results_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.throughput([ran("mixed", False, 0.5), ran("lognormal", False, 0.5)], "title", tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_the_docs_have_a_row_for_each_workload(tmp_path: Path) -> None:
    records = [*ran("mixed", False, 0.5).records(FIGURE), FIGURE("roof_read_gbps", 5.0, "GB/s")]
    kept = [
        {"metric": r.metric, "value": r.value, "unit": r.unit, "model": r.model, "format": r.format} for r in records
    ]
    (tmp_path / "throughput.jsonl").write_text("\n".join(map(json.dumps, kept)))
    text = section("h200/throughput", tmp_path / "throughput")
    assert "| tiny | f32 | throughput_mixed_bs8 | 10 |  | 14 | 500 | 500 | 500 | 500 | 75 | 7 | 1 | 25 |  |" in text
    assert text.count("throughput_mixed_bs8") == 1 and "| tiny | f32 | roof_read_gbps | 5 GB/s |" in text
    assert "empty" in section("h200", tmp_path)  # it stands apart


# --- the verb -------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    code = main(shlex.split(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_verb_tells_as_json_and_keeps_records(
    capsys: pytest.CaptureFixture[str], tiny_engine: Path, tmp_path: Path
) -> None:
    out, trace = tmp_path / "r.jsonl", tmp_path / "t.jsonl"
    words = f"bench throughput {tiny_engine} --device cpu --json --out {out} --commit abc --workload"
    code, text, _ = run(capsys, f"{words} random --num_requests 6 --input_len 5:20 --output_len 4 --static")
    data = json.loads(text)
    assert code == 0 and [w["name"] for w in data["workloads"]] == ["offline_5-20_4"] and not data["left_out"]
    assert data["workloads"][0]["share_of_roof"] > 0 and 0 < data["workloads"][0]["busy"] <= 100
    metrics = [json.loads(line)["metric"] for line in out.read_text().splitlines()]
    assert metrics[:3] == ["roof_read_gbps", "roof_f32_tflops", "offline_5-20_4"] and len(metrics) == 20
    assert metrics[-2:] == ["offline_5-20_4_static", "inflight_over_static_offline_5-20_4"]
    trace.write_text('{"prompt": "In the beginning", "output_tokens": 4, "arrival": 0.1}')
    code, text, _ = run(capsys, f"{words} trace --trace {trace}")
    assert code == 0 and json.loads(text)["workloads"][0]["share_of_roof"] is None  # bounded by when it comes


def test_the_verb_measures_a_prefix_with_and_without_reuse(
    capsys: pytest.CaptureFixture[str], tiny_engine: Path
) -> None:
    words = "--workload shared-prefix --num_requests 4 --prefix_len 64 --input_len 6 --output_len 4"
    code, text, said = run(capsys, f"bench throughput {tiny_engine} --device cpu {words} --json")
    without, reused = json.loads(text)["workloads"]
    assert code == 0 and (without["name"], reused["name"]) == ("shared_prefix_64_uncached", "shared_prefix_64")
    assert without["reused"] == 0 and reused["reused"] == pytest.approx(100 * 3 * 64 / 280) and "reused" in said
    assert "shared_prefix_64_ttft_ratio" in [r["metric"] for r in json.loads(text)["records"]]
    code, text, _ = run(capsys, f"bench throughput {tiny_engine} --device cpu {words} --no_prefix_caching")
    assert code == 0 and "shared_prefix_64_uncached" in text and "ttft_ratio" not in text


def test_what_does_not_fit_is_left_out_and_nothing_left_is_an_error(
    capsys: pytest.CaptureFixture[str], tiny_engine: Path
) -> None:
    words = f"bench throughput {tiny_engine} --device cpu --workload"
    code, text, said = run(capsys, f"{words} 4/2:3,200/100:2,5/2:2@9")
    assert code == 0 and "left out: offline_200_100: 300 tokens a request exceed max_seq_len=256" in text
    assert "left out: offline_5_2: @9 exceeds max_batch_size=4" in text and "offline_4_2" in text
    code, text, said = run(capsys, f"{words} interrupted")
    assert code == 2 and not text and "interrupted: 32 requests and a prompt exceed max_batch_size=4" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--workload magic", "unknown"),
        ("--input_len 3:2", "neither a length from 1 nor LOW:HIGH"),
        ("--out /tmp", "cannot be written"),
        ("--workload trace --trace /nowhere", "cannot be read"),
    ],
)
def test_the_verb_refuses_before_any_work(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    code, text, err = run(capsys, f"bench throughput --device cpu {words}")
    assert code == 2 and not text and said in err and "ready" not in err
