"""The figures of one model, each a record with its share of the roof, as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import mean

from penstock.bench import roofs
from penstock.bench.latency import NEW, PROMPT, Samples, decode_rate, first_tokens, prefill_rate, run, settle
from penstock.bench.records import Maker, Record
from penstock.bench.subject import Opened
from penstock.bench.throughput import mixed, static
from penstock.bench.workload import MIXED_NEW, MIXED_PROMPT, TTFT_LENGTHS, mixed_requests, prompt
from penstock.engine.device import Device
from penstock.errors import OptionError
from penstock.kernels.roof import Roof, measure

PREFILL = (64, 2048)  # prompts, and tokens of each
BATCHES = (1, 8, 64)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured. What differs from the workload's definitions is noted in the records."""

    samples: int = 100  # first tokens at each prompt length
    repeats: int = 3
    new: int = NEW
    batches: tuple[int, ...] = BATCHES
    lengths: tuple[int, ...] = TTFT_LENGTHS

    def __post_init__(self) -> None:
        for name, value in (("iterations", self.samples), ("repeats", self.repeats), ("new_tokens", self.new - 1)):
            if value < 1:
                least = 1 + (name == "new_tokens")
                raise OptionError(f"{name}={value + least - 1} is too small; give at least {least}")
        for name, values in (("batches", self.batches), ("lengths", self.lengths)):
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise OptionError(f"{name}={values} must be distinct numbers, each at least 1; give some like 1,8,64")


@dataclass
class Figures:
    """Measures an opened model. `left_out` keeps what could not be measured, by metric, with the reason."""

    opened: Opened
    device: Device
    roof: Roof
    effort: Effort = field(default_factory=Effort)
    say: Say = lambda _: None
    left_out: dict[str, str] = field(default_factory=dict)
    samples: tuple[Samples, ...] = ()

    @property
    def figure(self) -> Maker:
        return self.opened.figure

    def skip(self, metric: str, reason: str) -> None:
        self.left_out[metric] = reason
        self.say(f"{metric} is left out: {reason}")

    def all(self, prefill: bool, throughput: bool) -> Iterator[Record]:
        """Every figure of an opened model that is asked for, each as soon as it is there; says what begins."""
        yield from self.latencies()
        if prefill:
            self.say("measuring prefill ...")
            sustained, rates = sustained_roof(self.opened, self.device, self.figure)
            yield from rates
            yield from self.prefill(sustained)
        if throughput:
            self.say("measuring throughput of mixed requests, in flight and in batches that wait ...")
            yield from self.throughput()

    def latencies(self) -> Iterator[Record]:
        """First tokens by prompt length, then the decode rate by batch."""
        opened = self.opened
        self.say("warming up ...")
        run(opened.llm, [prompt(min(100, opened.limits["max_seq_len"] - 4), 7, opened.vocab)], 4)
        settle(opened.llm)
        yield from self.first_tokens()
        for batch in self.effort.batches:
            yield from self.decode(batch)

    def first_tokens(self) -> Iterator[Record]:
        opened, effort = self.opened, self.effort
        fitting = tuple(n for n in effort.lengths if not opened.refusal(1, n + 1))
        for length in sorted(set(effort.lengths) - set(fitting)):
            self.skip(f"ttft at {length}", opened.refusal(1, length + 1))
        if not fitting:
            return
        self.say(f"measuring first tokens: {effort.samples} at each of {', '.join(map(str, fitting))} tokens ...")
        self.samples = first_tokens(opened.llm, effort.samples, fitting, opened.vocab)
        least = mean(roofs.first_token_roof(opened.engine, self.roof, n) for n in fitting) * 1e3
        means, tails = [s.mean for s in self.samples], [s.percentile(99) for s in self.samples]
        other = "" if fitting == TTFT_LENGTHS else f", prompts of {', '.join(map(str, fitting))}"
        note = f"{effort.samples} samples a length{other}"
        spread = (max(s.std for s in self.samples)) / 2
        yield self.figure("ttft_mean_ms", mean(means), "ms", least / mean(means), spread, note)
        yield self.figure("ttft_p99_ms", mean(tails), "ms", least / mean(tails), None, note)

    def decode(self, batch: int) -> Iterator[Record]:
        opened, new, metric = self.opened, self.effort.new, f"decode_bs{batch}"
        if reason := opened.refusal(batch, PROMPT + new):
            return self.skip(metric, reason)
        self.say(f"measuring decode at batch {batch} ...")
        before = opened.llm.stats()
        try:
            rate = decode_rate(opened.llm, batch, self.effort.repeats, opened.vocab, new)
        except OptionError as error:  # too few tokens for a rate; what else was measured stays
            return self.skip(metric, str(error))
        after = opened.llm.stats()
        share = rate.value / roofs.decode_roof(opened.engine, self.roof, batch, PROMPT + new / 2)
        note = "" if new == NEW else f"{new} new tokens instead of {NEW}"
        yield self.figure(metric, rate.value, "tok/s", share, rate.spread, note)
        if self.device.kind == "cuda":  # on a CPU the launch is the step itself
            spent, steps = (after[name] - before[name] for name in ("host_seconds", "host_steps"))
            note = "CPU time of the executor's thread from a read's end to the next launch's, prompts' steps included"
            yield self.figure(f"host_us_per_step_bs{batch}", 1e6 * spent / max(steps, 1), "us", note=note)

    def prefill(self, sustained: float | None) -> Iterator[Record]:
        """Two records of one measurement: against the burst rate, and against the sustained one (operations/s)."""
        opened, (count, length) = self.opened, PREFILL
        metric = f"prefill_{length}x{count}"
        if reason := opened.refusal(1, length + 1) or opened.refusal(count, 1):
            return self.skip(metric, reason)
        rate = prefill_rate(opened.llm, count, length, opened.vocab)
        asked = rate.value * opened.engine.work["flops_per_token"]
        for name, limit, kind in (
            (metric, self.roof.flops_per_s, "burst"),
            (f"{metric}_sustained", sustained, "sustained"),
        ):
            if limit is not None:
                note = f"roof: {kind} matrix rate, attention not counted"
                yield self.figure(name, rate.value, "tok/s", asked / limit, rate.spread, note)

    def throughput(self) -> Iterator[Record]:
        opened = self.opened
        if reason := opened.refusal(1, MIXED_PROMPT[1] + MIXED_NEW[1]):
            self.skip("throughput_mixed", reason)
            return self.skip("throughput_static", reason)
        requests, most = mixed_requests(vocab=opened.vocab), opened.limits["max_batch_size"]
        about = f"{len(requests)} requests, at most {most} at once"
        in_flight = mixed(opened.llm, requests)
        yield self.figure("throughput_mixed", in_flight, "tok/s", note=about)
        waiting = static(opened.llm, requests, most)
        yield self.figure("throughput_static", waiting, "tok/s", note=f"batches of {most} that wait for their longest")
        note = f"throughput_mixed / throughput_static, {about}"
        yield self.figure("claim_inflight", in_flight / waiting, "times", note=note)


def measured_roof(device: Device, format: str, figure: Maker) -> tuple[Roof, list[Record]]:
    """The roof of this machine now, and its records."""
    roof = measure(device, format)
    return roof, [
        figure("roof_read_gbps", roof.read_bytes_per_s / 1e9, "GB/s"),
        figure(f"roof_{format}_tflops", roof.flops_per_s / 1e12, "TFLOP/s"),
    ]


def sustained_roof(opened: Opened, device: Device, figure: Maker) -> tuple[float | None, list[Record]]:
    """The rate of the model's own products over seconds; none on a CPU."""
    rate = roofs.sustained(opened.engine, device)
    if rate is None:
        return None, []
    note = f"{roofs.SECONDS:.0f} s of the model's own linears at {roofs.ROWS} tokens"
    return rate, [figure(f"roof_sustained_tflops_{opened.engine.format}", rate / 1e12, "TFLOP/s", note=note)]
