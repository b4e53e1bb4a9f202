"""Pictures of the reports, as PNG. matplotlib is an extra: what needs it says so before anything is measured."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.bench.report import Report
from penstock.bench.result import Result
from penstock.bench.scaling import Point
from penstock.bench.throughput import quantile
from penstock.bench.workload import percentile
from penstock.errors import OptionError

if TYPE_CHECKING:
    from penstock.bench.serve.figures import Figures


def require() -> None:
    """Raises OptionError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            "--plot needs matplotlib, which is not installed; in Penstock's checkout: pip install -e '.[bench]'; "
            "or leave --plot out"
        )


def latency(report: Report, path: Path) -> None:
    """First token by prompt length, and decode rate by batch, each with its roof."""
    figure, (left, right) = _two_panels()
    lengths = [row.prompt_length for row in report.rows]
    for name, label in (("ttft_ms", "mean"), ("p99_ms", "P99"), ("roof_ms", "roof")):
        left.plot(lengths, [getattr(r, name) for r in report.rows], _style(label), label=label)
    _label(left, "first token", "prompt length (tokens)", "ms")
    decode = [r for r in report.decode if r.metric.startswith("decode_bs")]
    batches = [int(r.metric.removeprefix("decode_bs")) for r in decode]
    right.loglog(batches, [r.value for r in decode], _style("decode"), label="measured")
    right.loglog(batches, [r.value / (r.share_of_roof or 1) for r in decode], _style("roof"), label="roof")
    _label(right, "decode", "batch", "tok/s")
    _save(figure, f"{report.model} ({report.format}) on {report.device}", path)


def scaling(points: Sequence[Point], title: str, path: Path) -> None:
    """Decode rate by batch and first token by context, a line for each of the other, with their roofs."""
    figure, (left, right) = _two_panels()
    for context in sorted({p.context for p in points}):
        some = sorted((p for p in points if p.context == context), key=lambda p: p.batch)
        line = left.loglog([p.batch for p in some], [p.tokens_per_s for p in some], "o-", label=f"{context} tokens")
        left.loglog([p.batch for p in some], [p.roof_tokens_per_s for p in some], ":", color=line[0].get_color())
    _label(left, "decode (dotted: roof)", "batch", "tok/s")
    for batch in sorted({p.batch for p in points}):
        some = sorted((p for p in points if p.batch == batch), key=lambda p: p.context)
        line = right.loglog([p.context for p in some], [p.ttft_ms for p in some], "o-", label=f"batch {batch}")
        right.loglog([p.context for p in some], [p.roof_ttft_ms for p in some], ":", color=line[0].get_color())
    _label(right, "mean first token, all queued at once (dotted: roof)", "context (tokens)", "ms")
    _save(figure, title, path)


def throughput(results: Sequence[Result], title: str, path: Path) -> None:
    """Output rate by workload beside its roof, and how long what share of inter-token times is at most."""
    figure, (left, right) = _two_panels()
    names, places = [r.name for r in results], range(len(results))
    left.barh(places, [r.rate / (r.share or 1) for r in results], fill=False, linestyle=":", label="roof")
    left.barh(places, [r.rate for r in results], label="measured")
    left.set_yticks(places, names)
    _label(left, "output", "tok/s", "")
    for result in results:
        shares = [*range(0, 100, 2), 99]
        right.semilogy(shares, [1e3 * quantile(result.flow.waits, q) for q in shares], label=result.name)
    _label(right, "between two tokens", "percentile", "ms")
    _save(figure, title, path)


def serving(runs: Sequence[Figures], title: str, path: Path) -> None:
    """How long what share of the latencies is at most, and the chunks that came in each second."""
    figure, (left, right) = _two_panels()
    shares = [*range(0, 100, 2), 99]
    for run in runs:
        for name in (name for name in ("ttft", "itl", "e2el") if run.times[name]):
            left.semilogy(shares, [percentile(run.times[name], q) for q in shares], label=f"{name} {run.name}")
        stamps = [at for it in run.good for at in it.stamps]
        right.hist(stamps, bins=range(int(run.run.seconds) + 2), histtype="step", label=run.name)
    _label(left, "latencies", "percentile", "ms")
    _label(right, "chunks in each second", "second", "chunks/s")
    _save(figure, title, path)


def _two_panels() -> tuple[Any, Any]:
    require()
    # Draws to memory: no display, and no state shared with plots of the caller's own.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(12, 4.5), layout="constrained")
    return figure, figure.subplots(1, 2)


def _style(label: str) -> str:
    return ":" if label == "roof" else "o-"


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
