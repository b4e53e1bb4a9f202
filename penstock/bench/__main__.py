"""`python -m penstock.bench --model llama3.1-8b --out FILE`: every figure of a workload, from a fresh build on."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from penstock.bench import records
from penstock.bench.figures import Figures, measured_roof
from penstock.bench.latency import settle
from penstock.bench.memory import Peak, minimal
from penstock.bench.records import Maker, Record
from penstock.bench.start import start_times
from penstock.bench.subject import Subject, open_subject
from penstock.bench.workload import MODELS, write_model
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.kernels.device import detect

PARTS = {"prefill", "throughput", "memory"}  # what --skip may name


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    device = detect(arguments.device)
    if unknown := skipped(arguments.skip, device.kind) - PARTS:
        parser.error(f"--skip {', '.join(sorted(unknown))}: there are {', '.join(sorted(PARTS))}")
    stamp = records.stamper(device, arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        for record in figures(arguments, device.kind, Path(folder)):
            print(records.line(record), flush=True)
            records.append(arguments.out, [stamp(record)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m penstock.bench", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3.1-8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=records.commit(), help="where the tree is no checkout")
    parser.add_argument("--timing", type=Path, help="where to copy what every tactic took")
    parser.add_argument("--max_batch_size", type=int, help="of the engine; default: the build's")
    parser.add_argument("--max_seq_len", type=int, default=4096, help="of the engine")
    about = "of prefill, throughput, memory those not to measure, with commas; default: nothing, on a CPU throughput"
    parser.add_argument("--skip", help=about)
    parser.add_argument("--start", action="store_true", help="also the seconds to a first token, first and cached")
    return parser


def skipped(words: str | None, device: str) -> set[str]:
    """What is left out: as asked, or on a CPU what takes it many minutes."""
    text = words if words is not None else "throughput" if device == "cpu" else ""
    return {word.strip() for word in text.split(",") if word.strip()}


def figures(arguments: argparse.Namespace, device: str, folder: Path) -> Iterator[Record]:
    """Every figure, each as soon as it is there."""
    options = BuildOptions(
        weights="random", device=device, cache_dir=folder / "cache",
        max_batch_size=arguments.max_batch_size, max_seq_len=arguments.max_seq_len,
    )  # fmt: skip
    start = time.perf_counter()
    with Peak(device) as peak:
        directory = build(write_model(arguments.model, folder), options, progress=_show)
    seconds = time.perf_counter() - start
    engine = store.load(directory)
    if arguments.timing is not None:
        shutil.copyfile(directory / store.TIMING, arguments.timing)
    yield from _built(arguments.model, engine, peak, seconds)
    yield from _run(arguments, directory, engine)
    if arguments.start:
        _say("measuring starts ...")
        yield from start_times(arguments.model, device)


def _built(name: str, engine: Engine, peak: Peak, seconds: float) -> Iterator[Record]:
    figure = Maker(name, engine.formats)
    yield figure("build_s", seconds, "s", note=f"random weights; {dict(engine.build_seconds)}")
    yield figure("weight_gib", engine.weight_bytes / 2**30, "GiB")
    yield figure("build_host_gib", peak.host / 2**30, "GiB", note="peak of this process, mapped files not counted")
    if peak.device:
        note = "peak on the GPU, CUDA contexts of the workers included"
        yield figure("build_device_gib", peak.device / 2**30, "GiB", note=note)


def _run(arguments: argparse.Namespace, directory: Path, engine: Engine) -> Iterator[Record]:
    device = detect(engine.device.kind)
    figure, left = Maker(arguments.model, engine.formats), skipped(arguments.skip, device.kind)
    if arguments.skip is None and left:
        _say(f"on a CPU {', '.join(sorted(left))} is skipped: it takes minutes; --skip= measures it too")
    _say("measuring the roof of this machine ...")
    roof, rates = measured_roof(device, engine.format, figure)
    yield from rates
    subject = Subject(arguments.model, str(directory), "checkpoint")
    if "memory" not in left and device.kind == "cuda":
        _say("measuring memory ...")
        yield from minimal(subject, engine, figure, _say)
    _say("loading ...")
    start = time.perf_counter()
    with open_subject(subject, device=device.kind) as opened:
        yield figure("load_s", time.perf_counter() - start, "s", note="random weights")
        start = time.perf_counter()
        settle(opened.llm)
        yield figure(
            "capture_rest_s", time.perf_counter() - start, "s", note="buckets captured while idle, after ready"
        )
        yield from Figures(opened, device, roof, say=_say).all("prefill" not in left, "throughput" not in left)


def _show(stage: str, done: int, total: int) -> None:
    if done == 0 or (total and done == total):
        _say(f"{stage} {done}/{total}")


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
