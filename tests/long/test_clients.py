"""Programs of others against `penstock serve` with the bundled model: the official client, lm-eval and aiperf.

Each in an environment of its own, made here by pip; where the index does not have it, the test is skipped and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams, bundled
from penstock.bench.serve.local import served
from tests.long import results

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
CLIENTS = Path(__file__).parent / "clients"
CHOICES, QUESTIONS = 4, 16
# What the tests set for themselves is not for others: offline, aiperf looks for every tokenizer in a hub cache alone.
HIDDEN = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "HF_HUB_OFFLINE")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served([], 300) as found:
        yield found


def environment(folder: Path, *specs: str) -> Path:
    """The folder of programs of a new environment with these packages in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    done = subprocess.run(
        [str(folder / "bin/pip"), "install", "-q", "--disable-pip-version-check", *specs],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(specs)} here: {done.stderr.strip()[-300:]}")
    return folder / "bin"


def run(*command: str | Path, more: Mapping[str, str] | None = None) -> tuple[str, float]:
    """What it printed, and its seconds."""
    start = time.perf_counter()
    own = {k: v for k, v in os.environ.items() if k not in HIDDEN} | dict(more or {})
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=own, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout, time.perf_counter() - start


def version(programs: Path, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return run(programs / "python", "-c", code)[0].strip()


@pytest.mark.parametrize("major", [2, 3])
def test_the_official_client(url: str, tmp_path: Path, major: int) -> None:
    programs = environment(tmp_path / "env", f"openai>={major},<{major + 1}")
    text, seconds = run(programs / "python", CLIENTS / "openai_calls.py", f"{url}/v1")
    found = json.loads(text)
    results.write(f"client_openai_{major}", **found, seconds=seconds)
    assert found["version"].startswith(f"{major}.")


# --- lm-eval --------------------------------------------------------------------------------------------------------


def questions() -> list[dict[str, Any]]:
    """A passage's begin, and four ends of which one is its own."""
    passages = [json.loads(line)["text"].split() for line in bundled.heldout().read_text("utf-8").splitlines()]
    parts = [(" ".join(p[:40]), " ".join(p[40:52])) for p in passages if len(p) > 60][: QUESTIONS + CHOICES]
    return [
        {"context": parts[i][0], "choices": [parts[i + k][1] for k in range(CHOICES)], "answer": 0}
        for i in range(QUESTIONS)
    ]


def write_task(folder: Path) -> None:
    folder.mkdir()
    (folder / "ends.jsonl").write_text("\n".join(map(json.dumps, questions())))
    (folder / "ends.yaml").write_text(
        f"task: ends\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'ends.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "metadata:\n  version: 1.0\n"
    )


def expected(samples: list[dict[str, Any]]) -> list[float]:
    """Log-probability of each choice, by the library and without HTTP; as there, no token begins the text."""
    with LLM() as llm:
        found = []
        for sample in samples:
            for argument in sample["arguments"].values():
                context, end = argument["arg_0"], argument["arg_1"]
                whole, head = (llm.tokenizer.encode(text, False) for text in (context + end, context))
                found.append((whole, len(head)))
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in found], params)
    return [
        sum(scores[token] for token, scores in zip(ids[head:], output.prompt_logprobs[head:], strict=True))
        for (ids, head), output in zip(found, outputs, strict=True)
    ]


def test_lm_eval(url: str, tmp_path: Path) -> None:
    programs = environment(tmp_path / "env", "lm-eval[api]", "transformers")
    write_task(tmp_path / "task")
    out = tmp_path / "out"
    arguments = (
        f"model=bundled,base_url={url}/v1/completions,tokenizer={bundled.target()},num_concurrent=4,max_retries=1"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    _, seconds = run(
        programs / "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "ends",
        "--include_path", tmp_path / "task", "--output_path", out, "--log_samples", "--batch_size", "4", more=offline,
    )  # fmt: skip
    (whole,), (log,) = out.rglob("results_*.json"), out.rglob("samples_*.jsonl")
    accuracy = json.loads(whole.read_text())["results"]["ends"]["acc,none"]
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    scores = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    wanted = expected(samples)
    right = sum(wanted[i] == max(wanted[i : i + CHOICES]) for i in range(0, len(wanted), CHOICES)) / len(samples)
    apart = max(abs(a - b) for a, b in zip(scores, wanted, strict=True))
    results.write(
        "client_lm_eval", version=version(programs, "lm_eval"), questions=len(samples), choices=CHOICES,
        accuracy=accuracy, most_apart_from_library=apart, seconds=seconds,
    )  # fmt: skip
    assert len(samples) == QUESTIONS and len(scores) == QUESTIONS * CHOICES and apart < 1e-3
    assert accuracy == pytest.approx(right) and right > 1 / CHOICES


# --- aiperf ---------------------------------------------------------------------------------------------------------


def test_aiperf(url: str, tmp_path: Path) -> None:
    programs = environment(tmp_path / "env", "aiperf==0.13.*")
    out = tmp_path / "out"
    own = {"HF_HOME": str(tmp_path / "home"), "PATH": f"{programs}:{os.environ['PATH']}"}
    _, seconds = run(
        programs / "aiperf", "profile", "--model", "bundled", "--url", url, "--endpoint-type", "completions",
        "--streaming", "--tokenizer", bundled.target(), "--concurrency", "4", "--request-count", "32",
        "--synthetic-input-tokens-mean", "48", "--output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true",
        "--ui", "none", "--artifact-dir", out, more=own,
    )  # fmt: skip
    (profile,) = out.rglob("profile_export_aiperf.json")
    found = json.loads(profile.read_text())
    kept = {
        name: found[name] for name in ("time_to_first_token", "inter_token_latency", "request_count") if name in found
    }
    results.write("client_aiperf", version=version(programs, "aiperf"), seconds=seconds, **kept)
    assert found["request_count"]["avg"] == 32 and not found.get("error_request_count")
    assert found["time_to_first_token"]["avg"] > 0
