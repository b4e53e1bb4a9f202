"""What `penstock bench throughput` does: open a model as each workload wants it, run that, and tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock.bench import plot
from penstock.bench.figures import Say, measured_roof, sustained_roof
from penstock.bench.ideal import ideal
from penstock.bench.latency import run, settle
from penstock.bench.records import Record, line, stamper
from penstock.bench.report import columns
from penstock.bench.requests import Asked, Workload
from penstock.bench.result import HEAD, LEGEND, SIDE, Result, of_waits, over_static, over_uncached
from penstock.bench.session import Shown, Told
from penstock.bench.subject import Opened, Subject, find, open_subject
from penstock.bench.throughput import RUNNING_PROMPT, flow, interrupted, static
from penstock.bench.workload import prompt
from penstock.engine.device import Device
from penstock.errors import OptionError
from penstock.kernels.device import detect
from penstock.kernels.roof import Roof
from penstock.text.tokenizer import Tokenizer

WITH_PREFIXES = ("shared-prefix", "trace")  # workloads for which reuse is turned on


@dataclass(frozen=True, slots=True)
class Wish:
    """`static`: the same requests also in batches that wait. `reuse`: of equal prefixes, where a workload has some; a
    shared prefix is then measured without it as well."""

    workloads: tuple[Workload, ...]
    static: bool = False
    reuse: bool = True
    picture: Path | None = None


def throughput_report(
    model: str | None, weights: str, wish: Wish, shown: Shown, say: Say, arguments: Mapping[str, Any]
) -> Told:
    """Every workload, each in a model opened for its limit. Raises OptionError where none of them fits."""
    if wish.picture:
        plot.require()
    device = detect(arguments.get("device") or "auto")
    session = Session(find(model, weights, arguments.get("cache_dir")), arguments, device, wish, say)
    with shown as progress:
        first = open_subject(session.subject, progress, **arguments)
    session.run(first)
    if not session.records:
        raise OptionError("; ".join(f"{name}: {why}" for name, why in session.left_out.items()))
    return session.told(first)


@dataclass
class Session:
    """One model, opened anew for each limit and way of reuse. `left_out`: by workload, the reason."""

    subject: Subject
    arguments: Mapping[str, Any]
    device: Device
    wish: Wish
    say: Say
    results: list[Result] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    roof_records: list[Record] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rates: tuple[Roof, Roof | None] | None = None  # burst and sustained

    def run(self, opened: Opened) -> None:
        """Those workloads first that run on the model as it is open; it is closed then."""
        most = opened.limits["max_batch_size"]
        groups = self._groups(most)
        with opened:
            settle(opened.llm)
            self.rates = self._measured_rates(opened)
            self._group(opened, groups.pop((most, False), []), reuse=False)
        engine = replace(self.subject, model=str(opened.llm.engine_dir))
        for (batch, reuse), works in groups.items():
            limits = {**self.arguments, "max_batch_size": batch, "enable_prefix_caching": reuse}
            with open_subject(engine, **limits) as again:
                settle(again.llm)
                self._group(again, works, reuse)
        self.records += over_uncached(opened.figure, self.results)

    def _groups(self, most: int) -> dict[tuple[int, bool], list[Workload]]:
        """Workloads by their limit and whether equal prefixes are reused."""
        groups: dict[tuple[int, bool], list[Workload]] = {}
        for work in self.wish.workloads:
            batch, reuses = work.batch or most, self.wish.reuse and work.kind in WITH_PREFIXES
            if batch > most:
                self._leave(work, f"@{batch} exceeds max_batch_size={most}")
                continue
            for reuse in {reuses, reuses and work.kind == "trace"}:
                groups.setdefault((batch, reuse), []).append(work)
        return groups

    def _measured_rates(self, opened: Opened) -> tuple[Roof, Roof | None]:
        roof, records = measured_roof(self.device, opened.engine.format, opened.figure)
        sustained, more = sustained_roof(opened, self.device, opened.figure)
        self.roof_records += [*records, *more]
        return roof, None if sustained is None else replace(roof, flops_per_s=sustained)

    def _group(self, opened: Opened, works: Sequence[Workload], reuse: bool) -> None:
        batch = opened.limits["max_batch_size"]
        if works:
            length = min(100, opened.limits["max_seq_len"] - 8)
            run(opened.llm, [prompt(length, i, opened.vocab) for i in range(min(4, batch))], 8)
        for work in works:
            self.say(f"measuring {work.name}, at most {batch} at once{', prefixes reused' if reuse else ''} ...")
            if work.kind == "interrupted":
                self._interrupted(opened, work)
            else:
                self._one(opened, work, reuse)

    def _one(self, opened: Opened, work: Workload, reuse: bool) -> None:
        requests = work.requests(opened.vocab, _Encode(opened))
        if reason := opened.refusal(1, max(len(each.prompt) + each.new for each in requests)):
            return self._leave(work, reason)
        result = self._result(opened, work, requests, reuse)
        self.results.append(result)
        self.records += result.records(opened.figure)
        if self.wish.static and not reuse:
            self.say(f"measuring {work.name} in batches of {result.batch} that wait for their longest ...")
            waiting = static(opened.llm, [(each.prompt, each.new) for each in requests], result.batch)
            self.records += over_static(opened.figure, result, waiting)

    def _result(self, opened: Opened, work: Workload, requests: Sequence[Asked], reuse: bool) -> Result:
        batch, measured = opened.limits["max_batch_size"], flow(opened.llm, requests)
        result = Result(work, batch, reuse, measured)
        if any(each.arrival for each in requests):  # then arrivals are what bounds it
            return result
        assert self.rates is not None
        bounds = [None if r is None else ideal(opened.engine, r, requests, batch, reuse) for r in self.rates]
        return replace(result, bound=bounds[0], sustained=bounds[1])

    def _interrupted(self, opened: Opened, work: Workload) -> None:
        given, most = work.given, opened.limits["max_seq_len"]
        assert given.num_requests is not None and given.input_len is not None
        running, length = given.num_requests, given.input_len[1]
        room = opened.limits["max_batch_size"] - 1  # a prompt has a slot of its own
        reason = opened.refusal(1, length + 1) or opened.refusal(1, RUNNING_PROMPT + 1)
        if running > room:
            reason = f"{running} requests and a prompt exceed max_batch_size={room + 1}"
        if reason:
            return self._leave(work, reason)
        alone, beside = interrupted(opened.llm, running, length, most, opened.vocab)
        self.records += of_waits(opened.figure, alone, beside, running, length)

    def _leave(self, work: Workload, reason: str) -> None:
        self.left_out[work.name] = reason
        self.say(f"{work.name} is left out: {reason}")

    def told(self, opened: Opened) -> Told:
        """Of all that was measured."""
        title = f"{self.subject.name} ({opened.engine.format}) on {self.device.name}"
        if self.wish.picture and self.results:
            plot.throughput(self.results, title, self.wish.picture)
        names = {result.name for result in self.results}
        others = [r for r in [*self.roof_records, *self.records] if r.metric not in names and SIDE not in r.metric]
        table = [*columns([HEAD, *(r.cells() for r in self.results)]), LEGEND] if self.results else []
        lost = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        stamped = [*map(stamper(self.device), [*self.roof_records, *self.records])]
        data = {
            "title": title, "workloads": [r.to_json() for r in self.results], "left_out": self.left_out,
            "records": [asdict(r) for r in stamped],
        }  # fmt: skip
        return Told("\n".join([title, *table, *map(line, others), *lost]), data, stamped)


@dataclass(frozen=True)
class _Encode:
    """Token ids of a text, by the model's own tokenizer, which is read when the first text comes."""

    opened: Opened

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self.opened.llm.engine_dir)

    def __call__(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text)
