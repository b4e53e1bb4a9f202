"""`penstock bench serve`: its arithmetic by hand, a server whose latencies are known, and servers that are broken."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import pytest

from penstock.bench import plot
from penstock.bench.records import Maker
from penstock.bench.requests import Given, parse
from penstock.bench.serve import local
from penstock.bench.serve.ask import Outcome
from penstock.bench.serve.drive import Run, ServerError
from penstock.bench.serve.figures import Figures, goals
from penstock.cli import main
from penstock.errors import OptionError
from tests.cpu.bench.fake_openai import Fake, serving


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    code = main(shlex.split(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(capsys: pytest.CaptureFixture[str], fake: Fake, words: str) -> dict[str, Any]:
    code, text, _ = run(capsys, f"bench serve --base_url {fake.url} --json --num_warmups 0 {words}")
    assert code == 0
    (found,) = json.loads(text)["runs"]
    return dict(found)


# --- arithmetic -----------------------------------------------------------------------------------------------------


def outcome(begun: float, stamps: list[float], ended: float, tokens: int, **more: Any) -> Outcome:
    return Outcome(0.0, begun, ended, stamps, 10, tokens, True, **more)


HAND = Figures(
    "hand",
    Run(
        (
            outcome(0.0, [0.5, 0.6, 0.8], 0.9, 3), replace(outcome(0.5, [1.5], 1.5, 1), planned=0.4),
            outcome(0.0, [0.1, 1.1], 2.0, 5), Outcome(0.0, 0.0, 0.1, error="HTTP 500", detail="fire"),
        ),
        2.0, 3, (0.0, 0.001, 0.010), 0.5,
    ),
    goals={"ttft": 600.0, "tpot": 200.0},
)  # fmt: skip


def test_figures_by_hand() -> None:
    of = {name: value for name, (value, _) in HAND.facts().items()}
    assert HAND.times["ttft"] == pytest.approx([500, 1000, 100]) and of["ttft_mean_ms"] == pytest.approx(1600 / 3)
    assert HAND.times["tpot"] == pytest.approx([150, 250]) and HAND.times["itl"] == pytest.approx([100, 200, 1000])
    assert HAND.times["e2el"] == pytest.approx([900, 1000, 2000]) and of["e2el_median_ms"] == pytest.approx(1000)
    assert (of["requests"], of["failed"], of["requests_per_s"], of["output_tokens"]) == (3, 1, 1.5, 9)
    assert HAND.rate_of_output == 4.5 and of["total"] == pytest.approx((30 + 9) / 2)
    assert of["goodput"] == 0.5  # the second missed its first token, the third its pace
    assert of["peak_output"] == pytest.approx(3 + 2.5)  # three tokens and half of five in the first second
    assert (of["client_lag_p50_ms"], of["client_lag_p99_ms"]) == (1.0, 10.0)
    assert HAND.late == pytest.approx([100.0])  # the one that had a time of its own


def test_the_block_has_the_lines_that_users_know() -> None:
    text = HAND.text()
    for line in (
        "Successful requests:                    3", "Benchmark duration (s):                 2.00",
        "Request goodput (req/s):                0.50", "Mean TTFT (ms):                         533.33",
        "Median ITL (ms):                        200.00", "P99 E2EL (ms):                          2000.00",
        "-----Time per Output Token (excl. 1st token)------",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert "the client itself was 10.0 ms late" in text and "1 x HTTP 500: fire" in text
    assert "a chunk holds 1.50 tokens" in text


def test_records_and_a_run_without_success() -> None:
    names = [r.metric for r in HAND.records(Maker("m", ""), "note")]
    assert names[0] == "hand" and {"hand.ttft_p99_ms", "hand.tpot_p95_ms", "hand.goodput"} <= set(names)
    failed = Figures("none", Run((Outcome(0.0, error="timeout"),), 1.0, 1, (), 0.1))
    assert "TTFT" not in failed.text() and failed.to_json()["errors"] == {"timeout": 1} and failed.peak_rate == 0


def test_bursts_have_the_same_rate_and_more_spread() -> None:
    def gaps(**given: Any) -> list[float]:
        (work,) = parse("4/4:4000", Given(rate=10.0, **given))
        return [b.arrival - a.arrival for a, b in pairwise(work.requests(99, lambda text: ()))]

    even, poisson, burst = (gaps(burstiness=4.0), gaps(), gaps(burstiness=0.25))
    assert all(mean(x) == pytest.approx(0.1, rel=0.1) for x in (even, poisson, burst))
    assert [pstdev(x) / 0.1 for x in (even, poisson, burst)] == pytest.approx([0.5, 1.0, 2.0], rel=0.15)


@pytest.mark.parametrize("text", ["ttft", "ttft:x", "itl:5", "ttft:0", "ttft:1,ttft:2", "ttft:-3"])
def test_goals_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match="--goodput"):
        goals([text])
    assert goals(["ttft:200,tpot:7.5"]) == {"ttft": 200.0, "tpot": 7.5}


# --- a server that is known -----------------------------------------------------------------------------------------


def test_known_latencies_come_out(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(first=0.2, gap=0.05)) as fake:
        found = measured(capsys, fake, "--workload 7/6:8 --goodput ttft:150")
    assert found["name"] == "serve_7_6" and (found["requests"], found["failed"]) == (8, 0)
    assert found["prompt_tokens"] == 56 and found["output_tokens"] == 48 and found["goodput"] == 0
    assert 200 <= found["ttft_median_ms"] < 300 and 50 <= found["itl_median_ms"] < 75
    assert 50 <= found["tpot_median_ms"] < 75 and 450 <= found["e2el_median_ms"] < 600
    assert found["peak_concurrency"] == 8 == fake.peak and found["client_lag_p50_ms"] < 50
    assert found["output_tokens_per_s"] == pytest.approx(48 / found["seconds"])
    body = fake.bodies[-1]
    assert len(body["prompt"]) == 7 and body["max_tokens"] == 6 and body["model"] == "fake-model"


def test_so_many_at_once_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(first=0.05, gap=0.0)) as fake:
        found = measured(capsys, fake, "--workload 4/2:12 --concurrency 3 --ignore_eos --extra_body '{\"seed\": 5}'")
    assert fake.peak == 3 == found["peak_concurrency"] and found["seconds"] >= 4 * 0.05
    assert (
        fake.bodies[-1]["ignore_eos"] is True and fake.bodies[-1]["seed"] == 5 and found["name"] == "serve_4_2_c3_seed"
    )


def test_requests_arrive_at_their_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(first=0.0, gap=0.0)) as fake:
        found = measured(capsys, fake, "--workload 4/1:40 --rate 80 --burstiness 2")
    assert 0.3 < found["seconds"] < 1.2 and found["request_rate"] == 80 and found["peak_concurrency"] < 40
    assert not [name for name in found if name.startswith("tpot")]  # of single tokens there is none


def test_chat_goes_as_text_and_chunks_are_not_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(first=0.05, gap=0.02, per_chunk=4)) as fake:
        found = measured(capsys, fake, "--endpoint chat --workload 5/12:3")
    body = fake.bodies[-1]
    assert len(body["messages"][0]["content"].split()) == 5 and body["max_completion_tokens"] == 12
    assert found["ttft_mean_ms"] >= 50, "the empty chunk of the role is no token"
    assert (found["chunks"], found["output_tokens"]) == (9, 36) and "4.00 tokens" in found["warnings"][0]


def test_ids_beyond_the_vocabulary_are_halved_and_text_is_the_last_resort(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(first=0.0, gap=0.0, takes_ids=4095)) as fake:
        measured(capsys, fake, "--workload 50/2:2")
        assert 1000 < max(fake.bodies[-1]["prompt"]) <= 3750
    with serving(Fake(first=0.0, gap=0.0, takes_ids=0)) as fake:
        code, text, said = run(capsys, f"bench serve --base_url {fake.url}/v1/ --workload 5/2:2")
        assert code == 0 and "prompts go as text" in said and "outside the vocabulary" in said
        assert len(fake.bodies[-1]["prompt"].split()) == 5 and "prompts as text" in text


def test_a_trace_sends_its_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    lines = [{"prompt": "Once upon", "output_tokens": 2}, {"prompt_tokens": 3, "output_tokens": 1, "arrival": 0.2}]
    trace.write_text("\n".join(map(json.dumps, lines)))
    with serving(Fake(first=0.0, gap=0.0)) as fake:
        found = measured(capsys, fake, f"--workload trace --trace {trace}")
    first, second = fake.bodies[-2:]
    assert first["prompt"] == "Once upon" and len(second["prompt"]) == 3 and found["seconds"] >= 0.2


def test_keys_records_and_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    with serving(Fake(first=0.0, gap=0.0, key="secret", usage=False)) as fake:
        words = f"bench serve --base_url {fake.url} --workload 4/3:2,5/2:2@1 --out {out} --commit abc"
        code, _, said = run(capsys, words)
        assert code == 1 and "HTTP 401" in said and said.strip().endswith("as --api_key") and not out.exists()
        code, _, said = run(capsys, f"{words} --model fake")
        assert code == 1 and "does not answer a first request (HTTP 401)" in said and said.strip().endswith("--api_key")
        code, text, _ = run(capsys, f"{words} --api_key secret")
    assert code == 0 and "2 answers came without usage" in text and "secret" not in text
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["metric"] for r in records if "." not in r["metric"]} == {"serve_4_3", "serve_5_2_c1"}
    assert {r["commit"] for r in records} == {"abc"} and {r["model"] for r in records} == {"fake-model"}
    assert records[0]["environment"]["client"]["cpu"] and "secret" not in out.read_text()


# --- broken servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("500", "HTTP 500"), ("cut", "cut off"), ("not json", "not JSON"), ("hang", "timeout"),
        ("no stream", "no stream"), ("error", "error in the stream"), ("silent", "no text"),
    ],
)  # fmt: skip
def test_a_request_that_breaks_is_counted_by_its_kind(capsys: pytest.CaptureFixture[str], way: str, kind: str) -> None:
    with serving(Fake(first=0.0, gap=0.0, way={2: way})) as fake:  # behind the first request, which settles the form
        found = measured(capsys, fake, "--workload 3/5:4 --timeout 0.5 --concurrency 1")
    assert found["errors"] == {kind: 1} and found["requests"] == 3 and found["output_tokens"] == 15
    assert any(line.startswith(f"1 x {kind}") for line in found["warnings"])


def test_a_server_that_answers_nothing_right_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake(way="500")) as fake:
        code, text, said = run(capsys, f"bench serve --base_url {fake.url} --workload 3/5:4")
        assert code == 1 and not text and "does not answer a first request (HTTP 500)" in said
    ways = {i: "500" for i in range(1, 9)}
    with serving(Fake(first=0, gap=0, way=ways)) as fake:
        code, text, said = run(capsys, f"bench serve --base_url {fake.url} --workload 3/1:4")
        assert code == 1 and "4 x HTTP 500" in text and "no request succeeded" in said
    code, text, said = run(capsys, f"bench serve --base_url {fake.url} --workload 3/5:4")
    assert code == 1 and not text and "start the server" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--base_url ftp://x", "is no URL"),
        ("--base_url http://x:y", "is no URL"),
        ("--base_url http://localhost:1 --device cpu", "--device: of a server that is started here"),
        ("--endpoint embeddings", "none of completions, chat"),
        ("--concurrency 0", "--concurrency=0"),
        ("--timeout 0", "--timeout=0"),
        ("--burstiness 2", "give one, or leave it out"),
        ("--workload interrupted", "bench throughput"),
        ("--extra_body [1]", "no JSON object"),
        ("--goodput itl:4", "none of ttft:MS"),
        ("--api_key x", "is for the server of --base_url"),
        ("--concurrency 2000000000 --base_url http://localhost:1", "files a process may open"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    code, text, err = run(capsys, f"bench serve {words}")
    assert code == 2 and not text and said in err and "starting" not in err


# --- a server of its own --------------------------------------------------------------------------------------------


def test_an_own_server_is_started_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, http.server as h\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200 if self.path == '/health' else 404); self.end_headers(); "
        "self.wfile.write(b'{\"warm\": true}')\n"
        "assert sys.argv[1:4] == ['serve', 'model', '--port'], sys.argv\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[4])), H).serve_forever()"
    )
    monkeypatch.setattr(local, "MAIN", program)
    with local.served(["model"], 20) as url:
        assert local._healthy(url)
    assert not local._healthy(url)


def test_an_own_server_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAIN", "import sys; print('no such model'); sys.exit(3)")
    with pytest.raises(ServerError, match="ended with 3: no such model"), local.served([], 20):
        pass
    monkeypatch.setattr(local, "MAIN", "import time; print('building', flush=True); time.sleep(60)")
    with pytest.raises(ServerError, match=r"not ready in time.*building"), local.served([], 1):
        pass


def test_runs_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.serving([HAND], "title", tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
