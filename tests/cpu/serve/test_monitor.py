"""The whole server with the bundled model: what its metrics, its log and its page say of a known run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cpu.serve.test_page import CHROMIUM, LAST, Watched, browser  # noqa: F401  browser is a fixture

ROOT = Path(__file__).resolve().parents[3]
KEY = "a-key-for-tests"
HEADERS = {"authorization": f"Bearer {KEY}"}


class Server:
    """`penstock serve` in a process of its own, and its log."""

    def __init__(self, folder: Path) -> None:
        keys = folder / "keys"
        keys.write_text(KEY)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from penstock.cli import main; main()", "serve", "--port", "0", "--device", "cpu",
             "--api_key_file", str(keys), "--log_format", "json", "--crash_dir", str(folder), "--max_batch_size", "8"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), (line, self.log)
        self.url = next(word for word in line.split() if word.startswith("http://"))

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def lines(self, route: str) -> list[dict[str, Any]]:
        """Of requests to it."""
        found = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in found if line.get("route") == route]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def samples(self) -> dict[str, float]:
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS).raise_for_status().text
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                assert sample.labels["model_name"] == "bundled"
                rest = ",".join(value for name, value in sorted(sample.labels.items()) if name != "model_name")
                found[f"{sample.name.removeprefix('penstock:')}{'{' + rest + '}' if rest else ''}"] = sample.value
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.close()


def test_metrics_and_log_of_a_known_run(server: Server) -> None:
    """Two texts of 5 tokens for each of two prompts, and one that is refused."""
    asked = {"prompt": [[5, 6, 7], [8, 9, 10, 11]], "n": 2, "max_tokens": 5, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    before = time.monotonic()
    response = httpx.post(url, json=asked, headers={**HEADERS, "x-request-id": "known"}, timeout=60)
    took = time.monotonic() - before
    assert response.status_code == 200
    assert httpx.post(url, json={**asked, "max_tokens": 0}, headers=HEADERS).status_code == 400
    deadline = time.monotonic() + 5
    while (found := server.samples())["num_requests_running"] or not found["steps_total"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    expected = {
        "prompt_tokens_total": 7, "generation_tokens_total": 20, "request_success_total{length}": 4,
        "request_success_total{error}": 0, "time_to_first_token_seconds_count": 2,
        "inter_token_latency_seconds_count": 16, "e2e_request_latency_seconds_count": 2,
        "request_queue_time_seconds_count": 2, "request_decode_time_seconds_count": 2,
        "request_prompt_tokens_sum": 7, "request_generation_tokens_sum": 20, "request_params_n_sum": 4,
        "request_params_max_tokens_sum": 10, "http_requests_total{POST,/v1/completions,200}": 1,
        "http_requests_total{POST,/v1/completions,400}": 1, "engine_state{ready}": 1, "engine_restarts_total": 0,
        "kv_cache_usage_perc": 0, "num_requests_waiting": 0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert 5 <= found["steps_total"] <= 20
    assert 0 < found["step_seconds_total"] < took
    stages = ("queue", "prefill", "decode")
    assert sum(found[f"request_{name}_time_seconds_sum"] for name in stages) <= found["e2e_request_latency_seconds_sum"]
    assert found["e2e_request_latency_seconds_sum"] < 2 * took
    assert "step_roof_share" not in found, "a CPU's engine knows no roof"
    told, refused = server.lines("/v1/completions")
    assert (told["request_id"], told["status"], told["prompts"], told["generation_tokens"]) == ("known", 200, 2, 20)
    assert told["finish"] == "length" and told["queue_seconds"] < told["seconds"] < took
    assert refused["status"] == 400 and "prompts" not in refused


def test_a_text_that_a_stop_string_ends_has_its_times(server: Server) -> None:
    """This process ends it, so the engine says nothing at its end."""
    before = server.samples()
    asked = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    url = f"{server.url}/v1/completions"
    text = httpx.post(url, json={**asked, "max_tokens": 12}, headers=HEADERS).json()["choices"][0]["text"]
    choice = httpx.post(url, json={**asked, "stop": text[len(text) // 2]}, headers=HEADERS).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    found = server.samples()
    for name in ("queue", "prefill", "decode", "inference"):
        count = f"request_{name}_time_seconds_count"
        assert found[count] - before[count] == 2, name
    assert found["request_success_total{stop}"] - before["request_success_total{stop}"] == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_page_talks_to_the_model(server: Server, browser: Any) -> None:  # noqa: F811
    opened = Watched(browser, server.url)
    page = opened.page
    page.click("summary")
    page.fill("#key", KEY)
    page.fill("input[name=temperature]", "0")
    page.fill("input[name=max_tokens]", "24")
    opened.wait("document.getElementById('model').textContent === 'bundled on cpu'")
    opened.errors.clear()  # the 401 before there was a key
    opened.ask("hello")
    opened.wait(f"document.querySelector('article.model') !== null && {LAST} !== ''", 20)
    opened.wait("document.querySelector('article.model small').textContent.includes('tokens in')", 20)
    first = page.text_content("article.model pre")
    opened.wait("Number(document.getElementById('speed').textContent) > 0")
    assert page.text_content("#roof") == "not measured here"
    page.fill("input[name=max_tokens]", "400")
    opened.ask("hello again")
    opened.wait("document.querySelectorAll('article.model pre')[1]?.textContent.length > 0", 20)
    opened.wait("document.getElementById('running').textContent === '1'")
    page.click("#stop")
    opened.wait("document.getElementById('running').textContent === '0'")
    assert page.text_content("article.model:last-of-type small") == "stopped"
    assert (opened.errors, opened.hosts) == ([], {server.url})
    page.close()
    asked = {"model": "bundled", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 24}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers=HEADERS, timeout=30)
    assert response.json()["choices"][0]["message"]["content"] == first
    stopped = server.lines("/v1/chat/completions")[1]
    assert stopped["client_gone"] is True and stopped["finish"] == "abort"
