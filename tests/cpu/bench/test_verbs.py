"""`penstock bench` from end to end, as text, as JSON and as records."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.__main__ import skipped
from penstock.bench.records import Maker
from penstock.cli import main
from penstock.engine import store

QUICK = "--device cpu --iterations 1 --repeats 1 --lengths 4,9 --batches 1,2 --new_tokens 64"


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    code = main(shlex.split(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_latency_as_text_and_records(capsys: pytest.CaptureFixture[str], tiny_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    code, text, said = run(capsys, f"bench latency {tiny_engine} {QUICK} --prefill --out {out} --commit abc")
    assert code == 0 and "Prompt Length | TTFT (ms) | P99 (ms)" in text and "average" in text
    assert "roof_read_gbps" in text and "prefill_2048x64 is left out" in said and "left out: prefill_2048x64" in text
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["metric"] for r in records] == [
        "roof_read_gbps", "roof_f32_tflops", "ttft_mean_ms", "ttft_p99_ms", "decode_bs1", "decode_bs2",
    ]  # fmt: skip
    assert {r["commit"] for r in records} == {"abc"} and all(r["environment"]["device"] == "cpu" for r in records)


def test_latency_against_others_as_json(
    capsys: pytest.CaptureFixture[str], tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(task: Any) -> Any:
        from penstock.bench.peers.task import Answer

        config = json.loads(Path(task.model, "config.json").read_text())
        asked.append((task.way, task.lengths, task.dtype, config["hidden_size"]))
        return Answer(1.0, 2.0, 3.0, 4.0, "peer 1")

    monkeypatch.setattr("penstock.bench.against.ask", ask)
    code, text, _ = run(capsys, f"bench latency {tiny_engine} {QUICK} --against eager,vllm --json")
    data = json.loads(text)
    assert code == 0 and asked == [(way, (4, 9), "float32", 64) for way in ("eager", "vllm")]
    assert [line["name"] for line in data["against"]] == ["penstock", "eager", "vllm"]
    peers = [r for r in data["records"] if r["engine"]]
    assert {r["engine"] for r in peers} == {"peer 1 eager", "peer 1"} and len(peers) == 8
    assert [row["prompt_length"] for row in data["rows"]] == [4, 9]


def test_scaling_names_what_it_leaves_out(capsys: pytest.CaptureFixture[str], tiny_engine: Path) -> None:
    words = f"bench scaling {tiny_engine} --device cpu --batches 1,2,64 --contexts 8,999 --new_tokens 3"
    code, text, _ = run(capsys, words)
    assert code == 0 and "left out: batch 64 at 8 tokens: 64 requests exceed max_batch_size=4" in text
    assert "left out: batch 1 at 999 tokens: 1002 tokens a request exceed max_seq_len=256" in text
    rows = [line.split(" | ") for line in text.splitlines() if " | " in line]
    assert [(int(r[0]), int(r[1])) for r in rows[1:]] == [(1, 8), (2, 8)]


def test_kernels_marks_what_runs(capsys: pytest.CaptureFixture[str], tiny_engine: Path) -> None:
    code, text, said = run(capsys, f"bench kernels {tiny_engine} --op sample")
    assert code == 0 and "* " in text and "/s" in text and "measured no rate" in said
    code, text, _ = run(capsys, f"bench kernels {tiny_engine} --json --bucket any")
    assert code == 0 and {row["at"] for row in json.loads(text)} == {"any"}


def test_claims_builds_without_fusing(capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path) -> None:
    words = f"bench claims {tiny_model} --device cpu --cache_dir {tmp_path} --repeats 2 --new_tokens 64 --json"
    code, text, _ = run(capsys, words)
    records = json.loads(text)["records"]
    assert code == 0 and [r["metric"] for r in records] == ["claim_fusion_bs1", "claim_fusion_bs8"]
    assert all(r["spread"] > 0 and "±" in r["note"] for r in records)
    engines = [store.load(path) for path in (tmp_path / "engines").iterdir()]
    pinned = next(e for e in engines if e.source["tactics"])
    plans = pinned.programs["decode"].phases["forward"].plans
    assert {p.tactic for key, each in plans.items() if key.startswith("linear_glu(") for p in each.values()} <= {
        "parts"
    }


def test_claims_of_no_spread_are_refused_before_a_build(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    code, _, said = run(capsys, f"bench claims {tiny_model} --device cpu --repeats 1")
    assert code == 2 and "--repeats 1" in said and "at least 2" in said
    code, _, said = run(capsys, f"bench claims {tiny_model} --device cpu --new_tokens 1")
    assert code == 2 and "new_tokens" in said


def test_starts_are_of_a_workloads_shapes(
    capsys: pytest.CaptureFixture[str], tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, said = run(capsys, f"bench latency {tiny_engine} {QUICK} --start")
    assert code == 2 and "is none; give llama2-7b" in said
    found = [Maker("tiny", "f32")("start_first_s", 1.5, "s")]
    monkeypatch.setattr("penstock.bench.session.start_times", lambda *given: given == ("tiny", "cpu") and found)
    code, text, _ = run(capsys, f"bench latency tiny {QUICK} --start --max_seq_len 64 --batches 1")
    assert code == 0 and "start_first_s" in text


def test_the_module_form_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    words = [sys.executable, "-m", "penstock.bench", "--model", "tiny", "--device", "cpu", "--out", str(out)]
    words += ["--skip", "prefill,throughput", "--max_seq_len", "130", "--commit", "abc"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line)["metric"] for line in out.read_text().splitlines()]
    assert metrics == [
        "build_s", "weight_gib", "build_host_gib", "roof_read_gbps", "roof_f32_tflops", "load_s", "capture_rest_s",
        "ttft_mean_ms", "ttft_p99_ms",
    ]  # fmt: skip
    assert "decode_bs1 is left out: 384 tokens a request exceed max_seq_len=130" in done.stderr
    begun = ("the roof", "loading", "warming up", "measuring first tokens")
    assert all(words in done.stderr for words in begun)


def test_on_a_cpu_the_module_leaves_throughput_out_unless_asked() -> None:
    assert skipped(None, "cpu") == {"throughput"} and skipped("", "cpu") == set() == skipped(None, "cuda")
    assert skipped("prefill, memory", "cpu") == {"prefill", "memory"}
    words = [sys.executable, "-m", "penstock.bench", "--device", "cpu", "--out", "never", "--skip", "everything"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "--skip everything: there are memory, prefill, throughput" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("latency --out /tmp", "cannot be written"),
        ("scaling --new_tokens 1 --batches 1 --contexts 16", "new_tokens=1 is too small; give at least 2"),
        ("latency --against ''", "names no peer"),
        ("claims --repeats 0", "--repeats 0"),
    ],
)
def test_bad_numbers_and_places_are_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    code, text, err = run(capsys, f"bench {words} --device cpu")
    assert code == 2 and not text and said in err and "ready" not in err


def test_claims_want_a_model(capsys: pytest.CaptureFixture[str], tiny_engine: Path) -> None:
    code, _, err = run(capsys, f"bench claims {tiny_engine} --device cpu")
    assert code == 2 and "name the model it was built from" in err and "ready" not in err
