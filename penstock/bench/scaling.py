"""How rate, first token and memory scale with batch and context, each against its roof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import mean

from penstock.bench import roofs
from penstock.bench.latency import settle
from penstock.bench.records import Maker, Record
from penstock.bench.subject import Opened
from penstock.bench.workload import prompt
from penstock.errors import OptionError
from penstock.kernels.roof import Roof
from penstock.runtime.requests import RequestOutput, SamplingParams

BATCHES = tuple(1 << i for i in range(10))
CONTEXTS = tuple(1024 << i for i in range(6))
SHORT_CONTEXTS = (64, 128, 256, 512)  # for a model that holds fewer tokens than the first of CONTEXTS
NEW = 32  # decode steps that are measured
LEAD = 512  # tokens more that an engine is built for: requests outlast the steps of the last one's prompt
HEAD = (
    "Batch", "Context", "decode (tok/s)", "of roof", "TTFT (ms)", "of roof", "prefill (tok/s)", "Memory (GB)",
    "least of it",
)  # fmt: skip
LEGEND = (
    "TTFT: the mean over the batch, all queued at once. Memory: weights, buffers and this batch's KV, of which\n"
    "weights and KV are the least. A roof lets bytes and operations hide behind each other entirely."
)


@dataclass(frozen=True, slots=True)
class Point:
    """One batch of prompts of one length. `memory_gb`: weights, buffers and the KV in use, beside the least of it."""

    batch: int
    context: int
    tokens_per_s: float
    roof_tokens_per_s: float
    ttft_ms: float
    roof_ttft_ms: float
    prefill_tokens_per_s: float
    memory_gb: float
    least_memory_gb: float

    @property
    def shares(self) -> tuple[float, float, float]:
        """Of the roof: decode rate, first token, memory."""
        return (
            self.tokens_per_s / self.roof_tokens_per_s,
            self.roof_ttft_ms / self.ttft_ms,
            self.least_memory_gb / self.memory_gb,
        )

    def cells(self) -> tuple[str, ...]:
        """As HEAD names them."""
        rate, first, memory = (f"{share:.1%}" for share in self.shares)
        measured = (f"{x:,.1f}" for x in (self.tokens_per_s, self.ttft_ms, self.prefill_tokens_per_s, self.memory_gb))
        decode, ttft, prefill, held = measured
        return (str(self.batch), str(self.context), decode, rate, ttft, first, prefill, held, memory)

    def records(self, figure: Maker) -> tuple[Record, ...]:
        name = f"bs{self.batch}_ctx{self.context}"
        rate, first, memory = self.shares
        return (
            figure(f"decode_{name}", self.tokens_per_s, "tok/s", rate),
            figure(f"ttft_{name}_ms", self.ttft_ms, "ms", first, note="mean over the batch, queued at once"),
            figure(f"memory_{name}_gb", self.memory_gb, "GB", memory, note="weights, buffers and this batch's KV"),
        )


@dataclass
class Scaling:
    """Measures combinations of an opened model; `refused`: those that do not fit, with the reason."""

    opened: Opened
    roof: Roof
    held: int  # bytes of the open engine without its KV pool
    new: int = NEW
    refused: dict[tuple[int, int], str] = field(default_factory=dict)

    def points(self, wanted: Sequence[tuple[int, int]], say: Callable[[str], None]) -> Iterator[Point]:
        """Each (batch, context) that fits, in order."""
        settle(self.opened.llm)
        for batch, context in wanted:
            if reason := self.opened.refusal(batch, context + self.tokens(batch, context)):
                self.refused[batch, context] = reason
                say(f"batch {batch} at {context} tokens is left out: {reason}")
            else:
                say(f"measuring batch {batch} at {context} tokens ...")
                yield self.point(batch, context)

    def tokens(self, batch: int, context: int) -> int:
        """New tokens of all requests but the last: enough that none ends before the last has decoded its own."""
        room = max(1, self.opened.limits["max_num_tokens"] - batch)  # decoding rows come first in a step
        steps = 5 * batch * context // (4 * room) + 4  # of the prompts, with a quarter for chunks that do not fill up
        return self.new + steps if batch > 1 else self.new

    def point(self, batch: int, context: int) -> Point:
        """The whole batch at once. The rate is that of the last request, which decodes beside all others."""
        outputs = self._run(batch, context)
        first = [o.metrics.time_to_first_token or 0.0 for o in outputs]
        last = outputs[-1]  # first come, first served
        assert last.metrics.finished is not None and last.metrics.first_token is not None
        steps = len(last.outputs[0].token_ids) - 1
        engine, work = self.opened.engine, self.opened.engine.work
        roof_decode = roofs.decode_roof(engine, self.roof, batch, context + self.new / 2)
        roof_first = roofs.first_token_roof(engine, self.roof, context, batch)
        kv = batch * (context + self.new) * work["kv_bytes_per_token"]
        return Point(
            batch, context, batch * steps / (last.metrics.finished - last.metrics.first_token), roof_decode,
            mean(first) * 1e3, roof_first * 1e3, batch * context / max(first),
            (self.held + self._blocks(batch, context) * engine.block_bytes) / 1e9, (engine.weight_bytes + kv) / 1e9,
        )  # fmt: skip

    def _run(self, batch: int, context: int) -> list[RequestOutput]:
        prompts = [{"prompt_token_ids": prompt(context, i, self.opened.vocab)} for i in range(batch)]
        lengths = [self.tokens(batch, context)] * (batch - 1) + [self.new]
        params = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0, detokenize=False) for n in lengths]
        return self.opened.llm.generate(prompts, params)

    def _blocks(self, batch: int, context: int) -> int:
        return batch * -(-(context + self.new) // self.opened.engine.profile.block_size)


def combinations(batches: Sequence[int], contexts: Sequence[int], grid: bool) -> list[tuple[int, int]]:
    """All of them for a grid; else every batch at the shortest context and every context at the smallest batch.

    Raises OptionError for a number under 1.
    """
    for name, values in (("batches", batches), ("contexts", contexts)):
        if not values or min(values) < 1:
            raise OptionError(f"{name}={','.join(map(str, values))} must be numbers from 1; give some like 1,8,64")
    if grid:
        return list(dict.fromkeys(product(sorted(batches), sorted(contexts))))
    by_batch = [(batch, min(contexts)) for batch in sorted(batches)]
    return list(dict.fromkeys([*by_batch, *((min(batches), context) for context in sorted(contexts))]))
