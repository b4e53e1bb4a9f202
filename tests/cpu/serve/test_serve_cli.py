"""`penstock serve` as it is started by a person: the bundled model, from the first line to the last signal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cli.serve import _warn
from penstock.serve.config import ServeConfig
from tests.long import results

ROOT = Path(__file__).resolve().parents[3]
KEY = "sk-of-the-test-1234"


def started(folder: Path, *words: str, patience: float = 120) -> tuple[subprocess.Popen[str], list[str]]:
    """The process, and what it says on stderr as it says it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    code = "import sys; from penstock.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        "--port",
        "0",
        "--dtype",
        "float32",
        "--max_batch_size",
        "16",
        *words,
    ]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        with process.stderr:
            said.extend(process.stderr)

    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=_end, args=(process, patience), daemon=True).start()
    return process, said


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """One that hangs must not keep its reader waiting."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()


def text_of(url: str, count: int) -> Any:
    body = {"prompt": "Once upon a time", "max_tokens": count, "temperature": 0, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status().json()


def test_from_the_first_line_to_the_last_signal(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}\n")
    process, said = started(tmp_path, "--api_key_file", "keys", "--served_model_name", "mine")
    assert process.stdout is not None
    with process.stdout:
        ready = process.stdout.readline()
        assert ready.startswith("ready: mine at http://127.0.0.1:"), said
        url = ready.split()[3]
        # The command that it names, run as it stands, but for the key.
        curl = shlex.split(ready.split("try: ")[1].replace("KEY", KEY))
        told = json.loads(subprocess.run([*curl, "-s"], capture_output=True, check=True).stdout)
        assert told["model"] == "mine" and told["usage"]["completion_tokens"] == 32
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()  # the engine is elsewhere
        with ThreadPoolExecutor() as pool:
            running = pool.submit(text_of, url, 300)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert running.result()["usage"]["completion_tokens"] == 300
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    assert not any(KEY in line or "Traceback" in line for line in said)


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    process, said = started(tmp_path, str(tmp_path), "--host", "0.0.0.0", "--api_key", KEY)
    assert process.stdout is not None
    with process.stdout:
        assert process.wait(60) == 1
    assert any(line.startswith("warning: a key given by --api_key") for line in said)
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and "has no tokenizer.json" in errors[0]
    assert not any("Traceback" in line or KEY in line for line in said)


def test_a_server_that_all_can_reach_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for host, keys, warned in (("0.0.0.0", (), True), ("0.0.0.0", (KEY,), False), ("127.0.0.2", (), False)):
        _warn(ServeConfig(host=host, api_keys=keys), False)
        assert ("WARNING: other machines can reach" in capsys.readouterr().err) == warned


CHECKS = "positive_data_acceptance"  # a schema cannot say which ids, names and lengths a model takes


def documented(folder: Path, examples: int, phases: str) -> dict[str, Any]:
    """What schemathesis finds, with so many examples of each endpoint."""
    process, said = started(folder, "--timeout", "20", "--crash_dir", str(folder / "crashes"), patience=3600)
    assert process.stdout is not None
    with process.stdout:
        try:
            url = process.stdout.readline().split()[3]
            words = f"--max-examples {examples} --phases {phases} --exclude-checks {CHECKS} --seed 1 --no-color"
            program = Path(sys.executable).with_name("st")
            done = subprocess.run(
                [program, "run", f"{url}/openapi.json", *words.split(), "--request-timeout", "60"],
                cwd=folder, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:  # pytest would cut an assert's words
                pytest.fail(f"{done.stdout[-6000:]}\n{''.join(said[-20:])}", pytrace=False)
            assert httpx.get(f"{url}/health").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert not [*folder.glob("crashes/*")]
    found = re.search(r"(\d+) generated, \d+ passed", done.stdout)
    assert found is not None, done.stdout[-2000:]
    return {"cases": int(found[1]), "phases": phases, "examples": examples}


def test_three_hundred_cases_of_the_document(tmp_path: Path) -> None:
    assert documented(tmp_path, 16, "coverage,fuzzing")["cases"] >= 300


@pytest.mark.long
def test_five_thousand_cases_of_the_document(tmp_path: Path) -> None:
    found = documented(tmp_path, 520, "examples,coverage,fuzzing,stateful")
    assert found["cases"] >= 5000
    results.write("schemathesis", **found)
