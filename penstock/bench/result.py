"""What a workload's run gave: its figures beside the roof, as a row of a table and as records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from penstock.bench.ideal import Ideal
from penstock.bench.records import Maker, Record
from penstock.bench.requests import Workload
from penstock.bench.throughput import LONG_PROMPTS, RUNNING_PROMPT, Flow, Waits, quantile
from penstock.bench.workload import percentile

SIDE = "."  # between a workload's name and what was measured beside its rate
HEAD = (
    "workload", "requests", "at once", "out (tok/s)", "of roof", "all (tok/s)", "TTFT mean/P50/P99 (ms)",
    "inter-token P50/P99 (ms)", "latency mean (s)", "GPU busy", "host (us)", "rows", "reused", "preempted", "waste",
)  # fmt: skip
LEGEND = (
    "roof: products and attention in turn, each at the rate that bounds it, all requests there at the start. host:\n"
    "CPU time of the executor's thread for a step, waits left out. rows: mean of the steps. waste: share of the room\n"
    "in held KV blocks that holds no token, mean. latency: from arrival to the end."
)


@dataclass(frozen=True)
class Result:
    """A run, at most `batch` requests at once. `bound`, `sustained`: its roof at the burst rate and at the sustained
    one, where all requests are there at the start. `reuse`: of the KV of equal prefixes."""

    work: Workload
    batch: int
    reuse: bool
    flow: Flow
    bound: Ideal | None = None
    sustained: Ideal | None = None

    @property
    def name(self) -> str:
        """Of the figure; where the limit is part of what is asked it says so."""
        limit = f"_bs{self.batch}" if self.work.kind in ("mixed", "lognormal") else ""
        return self.work.name + limit + ("_uncached" if self.work.kind == "shared-prefix" and not self.reuse else "")

    @property
    def rate(self) -> float:
        """Output tokens a second."""
        return self.flow.output_tokens / self.flow.seconds

    @property
    def share(self) -> float | None:
        return None if self.bound is None else self.bound.serial / self.flow.seconds

    @property
    def note(self) -> str:
        """How much was run, and the roof in its kinds."""
        texts = [f"{len(self.flow.outputs)} requests, at most {self.batch} at once, {self.flow.seconds:.1f} s"]
        for name, bound in (("burst", self.bound), ("sustained", self.sustained)):
            if bound is not None:
                rates = (self.flow.output_tokens / x for x in (bound.serial, bound.overlapped))
                texts.append("roof at the {} rate: kernels in turn {:,.0f}, overlapped {:,.0f}".format(name, *rates))
        return "; ".join(texts)

    def facts(self) -> dict[str, tuple[float, str]]:
        """What stands beside the rate: value and unit."""
        it = self.flow
        first, whole = ([1e3 * x for x in values] for values in (it.first_tokens, it.latencies))
        return {
            "total": ((it.prompt_tokens + it.output_tokens) / it.seconds, "tok/s"),
            "ttft_mean_ms": (mean(first), "ms"), "ttft_p50_ms": (percentile(first, 50), "ms"),
            "ttft_p99_ms": (percentile(first, 99), "ms"), "itl_p50_ms": (1e3 * quantile(it.waits, 50), "ms"),
            "itl_p99_ms": (1e3 * quantile(it.waits, 99), "ms"), "latency_mean_ms": (mean(whole), "ms"),
            "latency_p99_ms": (percentile(whole, 99), "ms"), "busy": (100 * it.busy, "%"),
            "host_us_per_step": (it.host_us, "us"), "steps": (len(it.steps), "steps"),
            "rows_per_step": (it.rows, "rows"), "reused": (100 * it.reused_tokens / it.prompt_tokens, "%"),
            "preemptions": (it.preemptions, "times"), "kv_waste": (100 * it.waste, "%"),
        }  # fmt: skip

    def cells(self) -> tuple[str, ...]:
        """As HEAD names them."""
        of = {name: value for name, (value, _) in self.facts().items()}
        first = "/".join(f"{of[f'ttft_{x}_ms']:,.0f}" for x in ("mean", "p50", "p99"))
        between = "/".join(f"{of[f'itl_{x}_ms']:.1f}" for x in ("p50", "p99"))
        return (
            self.name, str(len(self.flow.outputs)), str(self.batch), f"{self.rate:,.0f}",
            "" if self.share is None else f"{self.share:.1%}", f"{of['total']:,.0f}", first, between,
            f"{of['latency_mean_ms'] / 1e3:.2f}", f"{of['busy']:.1f}%", f"{of['host_us_per_step']:.0f}",
            f"{of['rows_per_step']:.0f}", f"{of['reused']:.1f}%", str(self.flow.preemptions), f"{of['kv_waste']:.1f}%",
        )  # fmt: skip

    def records(self, figure: Maker) -> Iterator[Record]:
        yield figure(self.name, self.rate, "tok/s", self.share, note=self.note)
        for name, (value, unit) in self.facts().items():
            yield figure(f"{self.name}{SIDE}{name}", value, unit)

    def to_json(self) -> dict[str, Any]:
        facts = {name: value for name, (value, _) in self.facts().items()}
        return {
            "name": self.name, "requests": len(self.flow.outputs), "max_batch_size": self.batch, "reuse": self.reuse,
            "seconds": self.flow.seconds, "output_tokens_per_s": self.rate, "share_of_roof": self.share, **facts,
        }  # fmt: skip


def over_static(figure: Maker, result: Result, waiting: float) -> Iterator[Record]:
    """In flight over batches that wait; `waiting`: their output tokens a second."""
    base = result.work.name.removeprefix("throughput_")
    about = f"the same requests in batches of {result.batch} that wait for their longest"
    yield figure(f"{result.name}_static", waiting, "tok/s", note=about)
    yield figure(f"inflight_over_static_{base}", result.rate / waiting, "times", note=f"over {about}")


def over_uncached(figure: Maker, results: Sequence[Result]) -> Iterator[Record]:
    """How many times sooner the first tokens come where the prefix is computed once."""
    without = {r.work: r for r in results if r.work.kind == "shared-prefix" and not r.reuse}
    for result in results:
        if result.reuse and result.work in without:
            first, other = (mean(x.flow.first_tokens) for x in (result, without[result.work]))
            note = f"mean first token {1e3 * other:.0f} ms without reuse, {1e3 * first:.0f} with it"
            yield figure(f"{result.name}_ttft_ratio", other / first, "times", note=note)


def of_waits(figure: Maker, alone: Waits, beside: Waits, running: int, length: int) -> Iterator[Record]:
    """Between two tokens of running requests, alone and beside prompts."""
    about = f"{running} requests that run, from prompts of {RUNNING_PROMPT}"
    idle, loaded = (1e3 * quantile(waits, 99) for waits in (alone, beside))
    yield figure("itl_p99_ms_idle", idle, "ms", note=about)
    note = f"{about}, while {LONG_PROMPTS} prompts of {length} tokens come one after another"
    yield figure("itl_p99_ms_under_prefill", loaded, "ms", note=note)
    yield figure("itl_p99_under_prefill_over_idle", loaded / idle, "times", note=note)
