"""Figures of a tiny engine on a CPU: which records there are, their shares by hand, and what is left out and why."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.bench import records, roofs
from penstock.bench.claims import fusion
from penstock.bench.figures import Effort, Figures
from penstock.bench.latency import Rate, Samples, rate_of, settle
from penstock.bench.memory import held_bytes
from penstock.bench.records import Maker, append, line, stamper
from penstock.bench.report import compile_ms, report, timings
from penstock.bench.subject import Opened, Subject, find, open_subject, refusal
from penstock.bench.throughput import mixed, static
from penstock.bench.workload import MODELS, TTFT_LENGTHS, mixed_requests, percentile, prompt
from penstock.engine.device import CPU
from penstock.errors import ExecutorError, OptionError
from penstock.kernels.roof import Roof
from penstock.models.directory import ModelDirectory

ROOF = Roof(read_bytes_per_s=1e9, flops_per_s=1e10)
EFFORT = Effort(samples=2, repeats=1, new=64, batches=(1, 2, 8), lengths=(5, 20, 300))


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Iterator[Opened]:
    with open_subject(Subject("tiny", str(tiny_engine), "checkpoint"), device="cpu") as model:
        yield model


@pytest.fixture
def figures(opened: Opened) -> Figures:
    return Figures(opened, CPU, ROOF, EFFORT)


def test_each_figure_is_a_record_with_its_share_and_what_cannot_be_is_named(figures: Figures) -> None:
    records = {r.metric: r for r in figures.latencies()}
    assert list(records) == ["ttft_mean_ms", "ttft_p99_ms", "decode_bs1", "decode_bs2"]
    assert figures.left_out == {
        "ttft at 300": "301 tokens a request exceed max_seq_len=256",
        "decode_bs8": "8 requests exceed max_batch_size=4",
    }
    least = sum(roofs.first_token_roof(figures.opened.engine, ROOF, n) for n in (5, 20)) / 2 * 1e3
    first = records["ttft_mean_ms"]
    assert (
        first.share_of_roof == pytest.approx(least / first.value)
        and "2 samples a length, prompts of 5, 20" in first.note
    )
    decode = records["decode_bs2"]
    assert decode.share_of_roof == pytest.approx(decode.value / roofs.decode_roof(figures.opened.engine, ROOF, 2, 160))
    assert "64 new tokens instead of 256" in decode.note and decode.model == "tiny" and decode.format == "f32"


def test_prefill_and_throughput_that_do_not_fit_are_left_out(figures: Figures) -> None:
    said: list[str] = []
    figures = replace(figures, say=said.append, left_out={})
    assert [*figures.prefill(None), *figures.throughput()] == []
    assert set(figures.left_out) == {"prefill_2048x64", "throughput_mixed", "throughput_static"}
    assert all("exceed max_seq_len=256" in text for text in said) and len(said) == 3


def test_prefill_stands_against_both_matrix_rates(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.bench.figures.PREFILL", (3, 40))
    burst, sustained = figures.prefill(5e9)
    assert (burst.metric, sustained.metric) == ("prefill_40x3", "prefill_40x3_sustained")
    flops = figures.opened.engine.work["flops_per_token"]
    assert burst.share_of_roof == pytest.approx(burst.value * flops / 1e10)
    assert sustained.share_of_roof == pytest.approx(burst.value * flops / 5e9)


def test_in_flight_batching_does_the_work_of_batches_that_wait(opened: Opened) -> None:
    requests = [(prompt(5, i, opened.vocab), 2 + 11 * (i % 3)) for i in range(9)]
    before = opened.llm.stats()
    assert mixed(opened.llm, requests) > 0
    between = opened.llm.stats()
    assert static(opened.llm, requests, 4) > 0
    after = opened.llm.stats()
    made = sum(new for _, new in requests)
    assert between["generated_tokens"] - before["generated_tokens"] == made
    assert after["generated_tokens"] - between["generated_tokens"] == made
    assert between["steps"] - before["steps"] < after["steps"] - between["steps"]  # batches that wait take more steps


def test_the_report_has_a_row_for_each_length_and_their_mean(figures: Figures) -> None:
    figures.samples = (Samples(10, (1.0, 3.0)), Samples(20, (5.0, 7.0)))
    decode = figures.figure("decode_bs1", 100.0, "tok/s", 0.5)
    told = report(figures, [decode], held=3_000_000)
    assert [(r.prompt_length, r.ttft_ms, r.p99_ms) for r in told.rows] == [(10, 2.0, 3.0), (20, 6.0, 7.0)]
    assert told.average[:2] == (4.0, 5.0) and told.rows[0].memory_gb == 0.003
    assert told.rows[0].compile_ms == pytest.approx(
        figures.opened.engine.build_seconds["select"] * 1e3
    )  # one size of all
    lines = told.text().splitlines()
    assert lines[1] == "Prompt Length | TTFT (ms) | P99 (ms) | Compile Time (ms) | Memory (GB)"
    assert lines[2].split(" | ")[0].strip() == "10" and lines[4].strip().startswith("average |      4.00 |     5.00")
    assert any("100.0" in text and "50.0%" in text for text in lines)
    assert told.to_json()["average"]["ttft_ms"] == 4.0


def test_the_build_is_shared_out_by_timings(opened: Opened) -> None:
    timing = {
        "a": {"points": {"T8": {"x": {}, "y": {}}, "T64": {"x": {}}}},
        "b": {"points": {"L1": {"x": {}}}, "cannot": {}},
        "c": {"cannot": {"x": "why"}},
    }
    counts = timings(timing)
    assert counts == {"T8": 2, "T64": 1, "L1": 1}
    whole = opened.engine.build_seconds["select"] * 1e3
    size = opened.engine.profile.tuned(20)
    assert compile_ms(opened, {f"T{size}": 2, "L1": 1, "T1": 5}, 20) == pytest.approx(whole * 3 / 8)


def test_the_roofs_are_arithmetic(opened: Opened) -> None:
    engine = opened.engine
    work, layers = engine.work, 2
    attention = 4 * 64 * 101 * layers  # two products of 64 numbers with 101 keys, two operations each
    assert roofs.attention_flops(engine, 1, 100) == attention
    step = 3 * (work["flops_per_token"] + work["flops_per_logit"] + attention)
    assert roofs.decode_roof(engine, Roof(1e30, 1.0), 3, 100) == pytest.approx(3 / step)
    read = work["weight_bytes"] + 3 * 100 * work["kv_bytes_per_token"]
    assert roofs.decode_roof(engine, Roof(1.0, 1e30), 3, 100) == pytest.approx(3 / read)
    assert roofs.first_token_roof(engine, Roof(1.0, 1e30), 7) == work["weight_bytes"]
    one = 7 * work["flops_per_token"] + work["flops_per_logit"] + roofs.attention_flops(engine, 7, 0)
    assert roofs.first_token_roof(engine, Roof(1e30, 1.0), 7, batch=3) == pytest.approx(2 * one)  # the second of three


def test_the_work_of_an_engine_counts_every_matrix_once(opened: Opened) -> None:
    shapes = [w.type.concrete({}) for name, w in opened.engine.weights.items() if len(w.type.shape) == 2]
    numbers = sum(a * b for a, b in shapes if min(a, b) > 1)  # rope frequencies are one row
    embedding = opened.engine.vocab_size * 64
    work = opened.engine.work
    assert work["flops_per_token"] + work["flops_per_logit"] == 2 * (numbers - embedding)
    assert work["weight_bytes"] == opened.engine.weight_bytes - 4 * embedding


@pytest.mark.parametrize(
    ("batch", "tokens", "said"),
    [(1, 64, ""), (1, 65, "65 tokens"), (3, 8, "3 requests"), (2, 33, "128 tokens of KV exceed the pool's 100")],
)
def test_a_refusal_names_the_limit_and_the_number(batch: int, tokens: int, said: str) -> None:
    why = refusal({"max_batch_size": 2, "max_seq_len": 64}, batch, tokens, kv_tokens=100, block=64)
    assert (said in why) if said else not why


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"repeats": 0}, {"new": 1}, {"batches": ()}, {"lengths": (5, 5)}, {"lengths": (0,)}]
)
def test_an_effort_that_measures_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="give"):
        Effort(**wrong)  # type: ignore[arg-type]


def test_records_are_stamped_and_appended(tmp_path: Path) -> None:
    record = stamper(CPU, "abc")(Maker("m", "f32")("x_s", 1.5, "s", 0.25))
    assert record.commit == "abc" and record.environment["device"] == "cpu" and record.when
    append(tmp_path / "a" / "r.jsonl", [record])
    append(tmp_path / "a" / "r.jsonl", [record])
    assert (tmp_path / "a" / "r.jsonl").read_text().count('"metric": "x_s"') == 2
    assert "25.0% of the roof" in line(record)


def test_what_is_measured_by_name(tmp_path: Path, tiny_engine: Path) -> None:
    assert find(None).name == "bundled"
    tiny = find("tiny", cache_dir=tmp_path)
    assert tiny.weights == "random" and Path(tiny.model, "config.json").is_file() and tiny.note == "random weights"
    assert find(str(tiny_engine)) == Subject(tiny_engine.name, str(tiny_engine), "checkpoint")


@pytest.mark.parametrize("name", MODELS)
def test_every_workload_is_a_model_that_we_read(name: str, tmp_path: Path) -> None:
    spec = ModelDirectory.open(Path(find(name, cache_dir=tmp_path).model)).spec
    assert spec.max_position == (131072 if name.endswith("long") else MODELS[name]["max_position_embeddings"])


def test_the_mixed_requests_are_the_workloads() -> None:
    numbers = random.Random(0)
    lengths = []
    for _ in range(3):
        lengths += [(numbers.randint(64, 1024), numbers.randint(32, 512))]
    requests = mixed_requests(512)
    assert [(len(ids), new) for ids, new in requests[:3]] == lengths and len(requests) == 512
    assert requests[1][0] == prompt(lengths[1][0], 1) and max(max(ids) for ids, _ in requests) <= 30000


def test_the_commit_is_of_penstocks_own_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = records.commit()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.chdir(tmp_path)
    assert records.commit() == here
    (tmp_path / "penstock").mkdir()
    monkeypatch.setattr(records, "TREE", tmp_path / "penstock")  # inside another project's tree
    assert records.commit() == ""


def test_a_rate_is_no_difference_of_nearly_equal_times() -> None:
    assert rate_of([(1.1, 0.1), (1.35, 0.1)], 2, 11).value == pytest.approx((20 + 16) / 2)
    for times in ([(0.1, 0.1)], [(0.1, 0.11)], [(0.2, 0.1), (0.33, 0.25)]):
        with pytest.raises(OptionError, match=r"--new_tokens 4: .* that is no rate; give more, like 256"):
            rate_of(times, 1, 4)


def test_a_rate_that_cannot_be_told_is_left_out(figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.bench.latency.run", lambda *_: 1.0)
    assert list(figures.decode(1)) == [] and "that is no rate" in figures.left_out["decode_bs1"]


def test_a_claim_carries_the_spread_of_both_rates(opened: Opened) -> None:
    record = fusion(opened, 1, Rate(120.0, 6.0), Rate(100.0, 5.0))
    assert record.value == pytest.approx(1.2) and record.spread == pytest.approx(1.2 * 0.1)
    assert "no difference" not in record.note
    assert "no difference beyond the spread" in fusion(opened, 1, Rate(105.0, 6.0), Rate(100.0, 5.0)).note


def test_each_part_is_said_as_it_begins(figures: Figures) -> None:
    said: list[str] = []
    figures.say = said.append
    for _ in figures.all(prefill=True, throughput=False):
        pass
    begun = [words for words in said if words.endswith("...")]
    assert [words.split(" at ")[0].split(":")[0] for words in begun] == [
        "warming up ...", "measuring first tokens", "measuring decode", "measuring decode", "measuring prefill ...",
    ]  # fmt: skip


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentile(range(100), 99) == 98 and percentile([3.0], 99) == 3.0 and TTFT_LENGTHS[-1] == 400


def test_memory_in_use_is_counted() -> None:
    assert held_bytes("cpu") > 10 << 20


def test_captures_are_waited_for_but_not_for_ever() -> None:
    class Slow:
        left = 3

        def stats(self) -> dict[str, int]:
            self.left -= 1
            return {"buckets": 3, "buckets_captured": 3 - max(self.left, 0)}

    settle(Slow(), patience=10)  # type: ignore[arg-type]
    with pytest.raises(ExecutorError, match="1 of 3 buckets are captured after 0 s"):
        settle(Slow(), patience=0)  # type: ignore[arg-type]
