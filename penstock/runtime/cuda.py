"""The GPU backend: one upload, one graph replay and one small copy back for each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.memory import Limits, MemoryPlan, aligned, calls_library, gib, plan_run
from penstock.engine.program import CONTROLLED, FRONT, PLAIN, SCORES
from penstock.engine.store import KERNELS
from penstock.errors import ResourceError
from penstock.ir.lazy import torch
from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.kernels import driver
from penstock.kernels.driver import load_file
from penstock.runtime.graphs import Bound, Graphs, Memory
from penstock.runtime.kv import pool
from penstock.runtime.kv.host import Restored, Saved
from penstock.runtime.kv.tables import Copy
from penstock.runtime.masks import Masker
from penstock.runtime.step import PLAIN_TAIL, Scores, Tail, Ticket, Timer, Visit, of_group
from penstock.runtime.upload import Numbers
from penstock.runtime.weights import Loading, release_pinned

IN_FLIGHT = 2
ROW_BYTES = {"sampled": 4, "top_ids": 4 * MOST_LOGPROBS, "top_values": 4 * MOST_LOGPROBS, "chosen": 4}
RING = IN_FLIGHT + 1  # pinned buffers: one may still be copied from while the next is written


@dataclass(frozen=True, slots=True)
class _Lane:
    """Pinned memory of one step in flight, and the same as numpy sees it."""

    upload: Any
    results: Mapping[str, Any]  # "sampled", and SCORES
    done: Any  # event
    numbers: Numbers  # of upload
    seen: Mapping[str, Any]  # of results


class _Region:
    """One allocation, handed out piece by piece, so that what lasts takes what the plan says, not a page more each."""

    def __init__(self, size: int) -> None:
        self._memory, self._at = torch.empty(size, dtype=torch.uint8, device="cuda"), 0

    def take(self, size: int) -> Any:
        """The next so many bytes, u8, aligned."""
        start, self._at = self._at, self._at + aligned(size)
        assert self._at <= len(self._memory), f"the plan is {self._at - len(self._memory)} bytes short"
        return self._memory[start : start + size]

    def numbers(self, count: int) -> Any:
        """i32 zeros."""
        return self.take(4 * count).view(torch.int32).zero_()


class CudaBackend:
    """Owns the device's memory and the captured graphs.

    `budget`: bytes of device memory that it may use in all. `limits` within the engine's profile; None: the profile's
    own. `host_blocks`: KV blocks for which memory of the host is pinned. `annotate`: each part of a launch gets an NVTX
    range, for a profiler to show. `load_seconds`: of opening, by stage; weights are on their way while binaries are
    loaded and graphs captured.
    """

    steps_in_flight = IN_FLIGHT

    def __init__(
        self, engine: Engine, directory: Path, budget: int, limits: Limits | None = None, host_blocks: int = 0
    ) -> None:
        start = time.perf_counter()
        self.engine, self.annotate = engine, False
        self.visit: Visit | None = None
        self.timer: Timer | None = None
        self.plan = plan_run(engine, budget, limits)
        self.num_blocks, self.host_blocks = self.plan.blocks, host_blocks
        self.memory: Mapping[str, int] = self.plan.facts()
        self._seconds: dict[str, float] = {}
        self.load_seconds: Mapping[str, float] = self._seconds
        self.slow_steps = 0
        self.uploads = 0  # copies to the device, for the test that there is at most one a step
        self._count = 0
        self._sent = b""  # the upload that the device holds
        self._masker = cache(lambda: Masker("cuda", engine.profile.max_batch_size, engine.vocab_size))
        self._stream: int = torch.cuda.current_stream().cuda_stream  # that replays take too: all are of one thread
        with self._stage("memory"), _no_more_than(self.plan):
            region = _Region(self.plan.region)
            torch.cuda.synchronize()
            self._pinned = driver.Pinned(host_blocks * engine.block_bytes)
        with Loading(engine, directory, region.take(self.plan.weights)) as loading:
            self._open(region, loading, directory, limits)
            loading.wait()
        self._seconds["weights"] = loading.seconds
        release_pinned()
        torch.cuda.synchronize()
        self._seconds["load"] = time.perf_counter() - start
        self._allocated = _allocations()

    def _open(self, region: _Region, loading: Loading, directory: Path, limits: Limits | None) -> None:
        """All but the numbers of the weights, which nothing reads before a step."""
        engine, profile = self.engine, self.engine.profile
        with self._stage("kernels"):
            kernels = {key: load_file(directory / KERNELS, key, facts) for key, facts in engine.kernels.items()}
        with self._stage("library"), _no_more_than(self.plan):
            stream = torch.cuda.Stream()
            if calls_library(engine):
                _warm_up(stream)
            arena, zeroed = region.take(self.plan.arena), region.take(engine.zeroed).zero_()
            slots, upload = region.numbers(profile.slots.size), region.numbers(profile.upload_size)
            rows = (limits or profile).max_batch_size
            own = pool.allocate(engine, self.num_blocks, rows, region.take)
            self.states: Mapping[str, Any] = {"slots": slots, **own}
            memory = Memory(arena, zeroed, upload, loading.weights, self.states, kernels)
            self._lanes: tuple[_Lane, ...] = tuple(self._lane() for _ in range(RING))
            self._encoder_lanes = tuple(self._lane() for _ in range(RING if engine.encoder else 0))
        with self._stage("capture"), _no_more_than(self.plan):
            self.graphs = Graphs(engine, memory, stream, limits)
            self.graphs.capture_sparse()

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int, tail: Tail = PLAIN_TAIL) -> Ticket:
        self._count += 1
        waited = self.graphs.larger + self.graphs.late
        lane = self._lanes[self._count % RING]  # whose step was read: no more than IN_FLIGHT are out
        with self._range("upload"):
            self._send(lane, upload)
        with self._range(f"replay of {tokens} tokens, {rows} rows"):
            if self.visit is not None:
                results = self._look(tokens, rows, logits, tail)
            elif tail.controlled:
                results = self._replay_parts(tokens, logits, tail)
            else:
                results = self._replay(tokens, rows, logits)
        self.slow_steps += bool(tail.rows or self.visit or self.graphs.larger + self.graphs.late > waited)
        with self._range("copy back"):
            for name in ("sampled", *(SCORES if tail.controlled else ())):
                if logits:  # a chunk inside a prompt gives none
                    size = ROW_BYTES[name] * logits
                    driver.copy(lane.results[name].data_ptr(), results[name].data_ptr(), size, self._stream)
            lane.done.record()
        return Ticket(self._count, logits)

    def encode(self, upload: Numbers, tokens: int, rows: int) -> None:
        lane = self._encoder_lanes[(self._count + 1) % RING]  # beside that of the step to come
        with self._range("upload"):
            self._send(lane, upload)
        with self._range(f"encoder's run of {tokens} tokens, {rows} rows"):
            self.graphs.find_encoder(tokens).graph.replay()

    def _send(self, lane: _Lane, upload: Numbers) -> None:
        """Unless the device has these numbers already, as in every step of the same decoding rows."""
        numbers = upload.tobytes()
        if numbers == self._sent:
            return
        lane.numbers[: len(upload)] = upload
        self._sent = b""  # unknown, should the copy fail
        driver.copy(self.graphs.memory.upload.data_ptr(), lane.upload.data_ptr(), len(numbers), self._stream)
        self._sent = numbers
        self.uploads += 1

    def _replay(self, tokens: int, rows: int, logits: int) -> Mapping[str, Any]:
        """The step's named results."""
        captured = self.graphs.find(tokens, rows, logits)
        self._timed(captured.graph.replay)
        return captured.results

    def _timed(self, replay: Callable[[], None]) -> None:
        if self.timer is None:
            replay()
        else:
            self.timer(replay)

    def _replay_parts(self, tokens: int, logits: int, tail: Tail) -> Mapping[str, Any]:
        """The same of a controlled step."""
        before = _allocations()
        front, rest = self.graphs.parts(tokens, logits)
        if tail.masks is not None:
            self._masker()
        self._allocated += _allocations() - before  # a capture may, and the first masks

        def replay() -> None:
            front.graph.replay()
            raw = tail.edit(front.results["logits"], self._masker)
            rest.graph.replay()
            if raw:
                self._masker().mend(rest.results, raw)

        self._timed(replay)
        return rest.results

    def _look(self, tokens: int, rows: int, logits: int, tail: Tail) -> Mapping[str, Any]:
        """The same by launching node after node, with each shown to the visitor."""
        phases = CONTROLLED if tail.controlled else PLAIN
        bound = self.graphs.bind(self.engine.profile.bucket(tokens, max(logits, 1)), phases=phases)
        with torch.no_grad():
            self._show(bound.of(FRONT), {"T": tokens, "S": rows, "L": logits})
            raw = tail.edit(bound.named["logits"], self._masker)
            self._show(bound.of(phases[-1:]), {"T": tokens, "S": rows, "L": logits})
            if raw:
                self._masker().mend(bound.named, raw)
        return bound.named

    def _show(self, bound: Bound, sizes: Mapping[str, int]) -> None:
        for each in bound.nodes:
            with self._range(f"{each.phase} {each.node.op}"):
                each.run()
            assert self.visit is not None
            self.visit(each.phase, each.node, each.outputs, sizes)

    def read(self, ticket: Ticket) -> list[int]:
        assert self._count - ticket.number < RING, f"step {ticket.number} was read too late"
        lane = self._lanes[ticket.number % RING]
        lane.done.synchronize()
        tokens: list[int] = lane.seen["sampled"][: ticket.logits].tolist()
        return tokens

    def scores(self, ticket: Ticket) -> Scores:
        seen = self._lanes[ticket.number % RING].seen
        return Scores(*(seen[name][: ticket.logits] for name in SCORES))

    def fork(self, histories: Sequence[tuple[int, int]], blocks: Sequence[Copy]) -> None:
        """A copy for each pair and layer: a pitch between layers may be more than one copy of many rows can have."""
        layout = self.engine.profile.slots
        own = self.states["slots"].data_ptr() + 4 * layout.history_at
        self._copy_rows(own, own, 4 * layout.history, histories)
        for group, base, _, size in self._layers():
            self._copy_rows(base, base, size, of_group(blocks, group))

    def save_blocks(self, blocks: Sequence[Saved]) -> None:
        for group, base, host, size in self._layers():
            self._copy_rows(base, host, size, of_group(blocks, group))

    def restore_blocks(self, blocks: Sequence[Restored]) -> None:
        for group, base, host, size in self._layers():
            self._copy_rows(host, base, size, of_group(blocks, group))

    def _layers(self) -> Iterator[tuple[int, int, int, int]]:
        """Of each layer's KV: group, address, that of its part of the host's memory, and the bytes of a block."""
        host = self._pinned.address
        for group, states in enumerate(self.engine.groups):
            for state in (self.states[node.name] for node in states.states):
                size = state.stride(0) * state.element_size()
                yield group, state.data_ptr(), host, size
                host += self.host_blocks * size

    def _copy_rows(self, source: int, target: int, size: int, pairs: Sequence[tuple[int, int]]) -> None:
        """From one address to another, (from, to) of each in rows of so many bytes."""
        for row, place in pairs:
            driver.copy(target + place * size, source + row * size, size, self._stream)

    def idle(self) -> bool:
        return self._capture(self.graphs.capture_next)

    def meanwhile(self) -> None:
        if self.graphs.is_due:
            self._capture(self.graphs.capture_due)

    def _capture(self, one: Callable[[], bool]) -> bool:
        before = _allocations()
        more = one()
        self._allocated += _allocations() - before  # a capture may; serving may not
        return more

    def counters(self) -> Mapping[str, int]:
        """buckets, buckets_captured; steps_in_larger_buckets, for want of a capture; late_captures: controlled
        steps that had to wait for one; uploads; reference_nodes: nodes of a step that no kernel runs; allocations: of
        device memory while serving, which should be none."""
        return {
            "buckets": self.graphs.count,
            "buckets_captured": self.graphs.done,
            "steps_in_larger_buckets": self.graphs.larger,
            "late_captures": self.graphs.late,
            "uploads": self.uploads,
            "reference_nodes": self.graphs.reference_nodes,
            "allocations": _allocations() - self._allocated,
        }

    def close(self) -> None:
        """Give the device's memory back."""
        torch.cuda.synchronize()
        self.graphs.close()
        self._lanes, self._encoder_lanes, self.states = (), (), {}
        self._pinned.free()
        torch.cuda.empty_cache()

    def _lane(self) -> _Lane:
        profile = self.engine.profile
        upload = torch.zeros(profile.upload_size, dtype=torch.int32, pin_memory=True)
        rows = profile.max_batch_size
        results = {
            "sampled": torch.zeros(rows, dtype=torch.int32, pin_memory=True),
            "top_ids": torch.zeros(rows, MOST_LOGPROBS, dtype=torch.int32, pin_memory=True),
            "top_values": torch.zeros(rows, MOST_LOGPROBS, pin_memory=True),
            "chosen": torch.zeros(rows, pin_memory=True),
        }
        seen = {name: tensor.numpy() for name, tensor in results.items()}
        return _Lane(upload, results, torch.cuda.Event(), upload.numpy(), seen)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start

    def _range(self, name: str) -> Any:
        """An NVTX range where somebody looks."""
        return torch.cuda.nvtx.range(f"penstock {name}") if self.annotate else nullcontext()


@contextmanager
def _no_more_than(plan: MemoryPlan) -> Iterator[None]:
    """The device may have less than it said: others take memory too. Raises ResourceError then."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, _ = torch.cuda.mem_get_info()
        raise ResourceError(
            f"the GPU has no room for the {gib(plan.total)} that were planned ({gib(free)} are free now); another "
            f"process may have taken it: lower gpu_memory_utilization or max_gpu_bytes, or end the other process"
        ) from None


def _warm_up(stream: Any) -> None:
    """Create this thread's library handles, and the workspace of that stream, which must not be made under capture."""
    with torch.no_grad(), torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.ones(16, 16, dtype=dtype, device="cuda")
            torch.mm(x, x)
            torch.addmm(x[0], x, x)
            if dtype != torch.float32:
                torch.mm(x, x, out_dtype=torch.float32)
    stream.synchronize()


def _allocations() -> int:
    """Of device memory, by torch, since the process began."""
    return int(torch.cuda.memory_stats().get("allocation.all.allocated", 0))
