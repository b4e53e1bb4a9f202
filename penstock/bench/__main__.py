"""`python -m penstock.bench --model llama3.1-8b --out FILE`: build, load, decode, first token, prefill, roof."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from penstock.bench import records
from penstock.bench.latency import NEW, PROMPT, decode_rate, first_token, prefill_rate, run, settle
from penstock.bench.memory import Peak
from penstock.bench.records import Record
from penstock.bench.workload import MODELS, prompt, write_model
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.kernels.device import detect
from penstock.kernels.roof import Roof, measure
from penstock.llm import LLM


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m penstock.bench", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3.1-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=records.commit(), help="where the tree is no checkout")
    parser.add_argument("--timing", type=Path, help="where to copy what every tactic took")
    arguments = parser.parse_args()
    device = detect(arguments.device)
    commit, when, environment = arguments.commit, records.now(), records.environment(device)
    with tempfile.TemporaryDirectory() as folder:
        for record in figures(arguments.model, device.kind, Path(folder), arguments.timing):
            share = "" if record.share_of_roof is None else f"  {record.share_of_roof:.1%} of the roof"
            print(f"{record.metric:24} {record.value:12.2f} {record.unit}{share} {record.note}", flush=True)
            stamped = replace(record, commit=commit, when=when, environment=environment)
            records.append(arguments.out, [stamped])


def figures(name: str, device: str, folder: Path, timing: Path | None) -> Iterator[Record]:
    """Every figure, each as soon as it is there."""
    options = BuildOptions(weights="random", device=device, cache_dir=folder / "cache", max_seq_len=4096)
    start = time.perf_counter()
    with Peak(device) as peak:
        directory = build(write_model(name, folder), options, progress=_show)
    seconds = time.perf_counter() - start
    engine = store.load(directory)
    if timing is not None:
        shutil.copyfile(directory / store.TIMING, timing)
    figure = partial(Record, model=name, format=engine.format)
    yield figure("build_s", seconds, "s", note=f"random weights; {dict(engine.build_seconds)}")
    yield figure("weight_gib", engine.weight_bytes / 2**30, "GiB")
    yield figure("build_host_gib", peak.host / 2**30, "GiB", note="peak of this process, mapped files not counted")
    if peak.device:
        note = "peak on the GPU, CUDA contexts of the workers included"
        yield figure("build_device_gib", peak.device / 2**30, "GiB", note=note)
    roof = measure(detect(device))
    yield figure("roof_read_gbps", roof.read_bytes_per_s / 1e9, "GB/s")
    yield figure(f"roof_{engine.format}_tflops", roof.flops_per_s / 1e12, "TFLOP/s")
    start = time.perf_counter()
    with LLM(directory, device=device, skip_tokenizer_init=True) as llm:
        yield figure("load_s", time.perf_counter() - start, "s", note="random weights")
        yield from latencies(llm, engine, roof, figure)


def latencies(llm: LLM, engine: Engine, roof: Roof, figure: Callable[..., Record]) -> Iterator[Record]:
    """Decode, first token and prefill of a loaded engine."""
    run(llm, [prompt(100, 7)], 4)
    start = time.perf_counter()
    settle(llm)
    yield figure("capture_rest_s", time.perf_counter() - start, "s", note="buckets captured while idle, after ready")
    for batch in (1, 8, 64):
        rate = decode_rate(llm, batch)
        share = rate.value / decode_roof(engine, roof, batch)
        yield figure(f"decode_bs{batch}", rate.value, "tok/s", share_of_roof=share, spread=rate.spread)
    first = first_token(llm)
    yield figure("ttft_mean_ms", first.mean_ms, "ms")
    yield figure("ttft_p99_ms", first.p99_ms, "ms", note="30 samples a length")
    rate = prefill_rate(llm)
    share = rate.value * engine.work["flops_per_token"] / roof.flops_per_s
    note = "roof: burst matrix rate, attention not counted"
    yield figure("prefill_2048x64", rate.value, "tok/s", share_of_roof=share, spread=rate.spread, note=note)


def decode_roof(engine: Engine, roof: Roof, batch: int) -> float:
    """Tokens a second when a step takes the longer of its bytes and its operations: weights once, KV of the context."""
    context = PROMPT + NEW / 2
    read = engine.work["weight_bytes"] + batch * context * engine.work["kv_bytes_per_token"]
    operations = batch * (engine.work["flops_per_token"] + engine.work["flops_per_logit"])
    return batch / max(read / roof.read_bytes_per_s, operations / roof.flops_per_s)


def _show(stage: str, done: int, total: int) -> None:
    if done == 0 or (total and done == total):
        print(f"[{time.strftime('%H:%M:%S')}] {stage} {done}/{total}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
