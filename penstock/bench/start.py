"""Start-up: from the start of a process to its first token, with nothing built, and with the engine built.

`python -m penstock.bench.start --model llama3.1-8b`. Every start is a process of its own. The first begins with an
empty cache directory, so that it builds; the cached ones find the engine there, in the page cache, as a restarted
server does. Before any of them a process imports torch, so that its files come from the page cache in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.bench import records
from penstock.bench.records import Record
from penstock.bench.workload import MODELS, prompt, write_model
from penstock.errors import PenstockError
from penstock.kernels.device import detect

CACHED = 3  # cached starts, of which the median counts
PROMPT = 128  # tokens
OPTIONS: Mapping[str, Any] = {"weights": "random", "max_seq_len": 4096, "skip_tokenizer_init": True}
PATIENCE = 900.0  # seconds for one start

# What is timed: a program as a user writes it. The parent's clock starts before the interpreter does.
PROGRAM = """
import json, sys, time
began = float(sys.argv[1])
marks = {"interpreter": time.time() - began}
from penstock import LLM, SamplingParams
marks["import penstock"] = time.time() - began
llm = LLM(sys.argv[2], **json.loads(sys.argv[3]))
marks["ready"] = time.time() - began
request = {"prompt_token_ids": json.loads(sys.argv[4])}
output = llm.generate(request, SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0))[0]
marks["first token"] = time.time() - began
assert len(output.outputs[0].token_ids) == 1
engine = str(llm.engine_dir)
llm.shutdown()
print(json.dumps({"marks": marks, "engine": engine}))
"""


def start_times(model: str, device: str = "auto", cached: int = CACHED) -> list[Record]:
    """Records start_first_s and start_cached_s of a workload model with random weights.

    Seconds from the start of a process to its first token; the notes say when it was where. The engine is built in a
    temporary directory, which must have room for it, and goes with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory, cache = write_model(model, Path(folder)), Path(folder) / "cache"
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        first = _start(directory, cache, device)
        again = [_start(directory, cache, device) for _ in range(cached)]
        engine = json.loads((Path(first["engine"]) / "engine.json").read_text())
    figure = Record("start_first_s", first["marks"]["first token"], "s", model, engine["format"])
    seconds = sorted(start["marks"]["first token"] for start in again)
    median = statistics.median(seconds)
    marks = next((start["marks"] for start in again if start["marks"]["first token"] == median), again[-1]["marks"])
    return [
        replace(figure, note=f"build: {_shown(engine['build_seconds'])}; reached: {_shown(first['marks'])}"),
        replace(
            figure, metric="start_cached_s", value=median, spread=(seconds[-1] - seconds[0]) / 2,
            note=f"median of {cached}; reached: {_shown(marks)}",
        ),
    ]  # fmt: skip


def _start(model: Path, cache: Path, device: str) -> dict[str, Any]:
    """One process. Raises PenstockError with what it said where it fails."""
    options = json.dumps({**OPTIONS, "device": device, "cache_dir": str(cache)})
    arguments = [str(time.time()), str(model), options, json.dumps(prompt(PROMPT, 0))]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    own = f"TRITON_CACHE_DIR={cache / 'triton'}"  # its compiler keeps kernels too, which a first start must not find
    done = subprocess.run(["env", own, *command], capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise PenstockError(f"a start of {model.name} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _shown(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m penstock.bench.start", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3.1-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cached", type=int, default=CACHED, help="cached starts to take the median of")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--commit", default=records.commit(), help="where the tree is no checkout")
    arguments = parser.parse_args()
    found = start_times(arguments.model, arguments.device, arguments.cached)
    for record in found:
        print(f"{record.metric:16} {record.value:8.2f} {record.unit}  {record.note}", flush=True)
    if arguments.out is not None:
        environment = records.environment(detect(arguments.device))
        stamp = {"commit": arguments.commit, "when": records.now(), "environment": environment}
        records.append(arguments.out, [replace(record, **stamp) for record in found])


if __name__ == "__main__":
    main()
