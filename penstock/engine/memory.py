"""The memory plan: what a run of an engine takes of its device, known before anything is loaded. No torch.

Everything that lasts is one allocation: weights, arena, slots and the KV pools. Beside it lie the library's workspace
and what the driver keeps of captured graphs and loaded binaries; those two are estimates, by the counts of launches and
binaries. The CUDA context belongs to the process and is in no budget.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from penstock.engine.groups import StateGroup
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.engine.program import (
    CONTROLLED_TAIL,
    DECODE,
    ENCODE,
    FRONT,
    PLAIN,
    Call,
    Phase,
    Plan,
    Program,
    bucket_name,
    encoder_bucket,
)
from penstock.errors import ResourceError
from penstock.ir.graph import Node

ALIGN = 256  # bytes
PAGE = 2 << 20  # bytes: what the driver gives memory out in
Key = tuple[int, int]  # (T bucket, L bucket)

# Measured on an H200 with driver 580 and torch 2.11.
CONTEXT = 690 << 20  # a CUDA context, with torch's streams and first kernel, as nvidia-smi counts it
LIBRARY = 33 << 20  # cuBLAS: the workspace that torch gives it on Hopper
LIBRARY_CODE = 64 << 20  # its handle and the kernels that the driver loads on first use
GRAPH, GRAPH_LAUNCH = 128 << 10, 2 << 10  # bytes of a captured graph, and of each launch in it
BINARY = 32 << 10  # a loaded kernel


class Limits(Protocol):
    """Of a run, or a profile's own."""

    @property
    def max_batch_size(self) -> int: ...
    @property
    def max_num_tokens(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. `slots`: with the upload and the zeroed memory; `workspace`: the library's; `graphs`: what the driver
    keeps of captured graphs and binaries; `by_slot`: states with a place for each slot. `blocks`: of the pools of
    `groups`, dummies included. `budget`: what may be used.
    """

    weights: int
    arena: int
    slots: int
    workspace: int
    graphs: int
    by_slot: int
    groups: tuple[StateGroup, ...]
    blocks: tuple[int, ...]
    block_size: int
    budget: int

    @property
    def kv(self) -> int:
        return sum(n * group.unit_bytes for n, group in zip(self.blocks, self.groups, strict=False))

    @property
    def tokens(self) -> int:
        """That the pools hold in layers which see all, if there are such; dummy blocks belong to nobody."""
        named = list(zip(self.groups, self.blocks, strict=False))
        least = min([n for group, n in named if not group.window] or [n for _, n in named], default=1)
        return (least - 1) * self.block_size

    @property
    def region(self) -> int:
        """The one allocation of everything that lasts."""
        return self.weights + self.arena + self.slots + self.by_slot + self.kv

    @property
    def total(self) -> int:
        """Without the CUDA context."""
        return aligned(self.region, PAGE) + self.workspace + self.graphs

    def facts(self) -> dict[str, Any]:
        """For programs. `kv_blocks`: as many as hold `kv_tokens`; `kv_groups`: of each group's pool."""
        return {
            "weights": self.weights, "arena": self.arena, "slots": self.slots, "workspace": self.workspace,
            "graphs": self.graphs, "kv": self.kv,
            "kv_blocks": self.tokens // self.block_size + 1, "kv_tokens": self.tokens,
            "kv_groups": {group.name: n for group, n in zip(self.groups, self.blocks, strict=True)},
            "state_by_slot": self.by_slot,
            "total": self.total, "budget": self.budget, "context": CONTEXT,
        }  # fmt: skip

    def __str__(self) -> str:
        """One line for people."""
        other = self.slots + self.by_slot + self.workspace + self.graphs
        return (
            f"memory plan: {gib(self.total)} of {gib(self.budget)} = weights {gib(self.weights)} + buffers "
            f"{gib(self.arena)} + KV {gib(self.kv)} ({blocks_said(self.facts())}, {self.tokens} tokens) + slots, "
            f"graphs and library {gib(other)}; besides, the CUDA context of about {gib(CONTEXT)}"
        )


def plan_run(engine: Engine, budget: int, limits: Limits | None = None) -> MemoryPlan:
    """The plan within `budget` bytes: as many blocks as it holds, no more than the limits can use; None: the profile's.

    Raises ResourceError where not even one request of max_seq_len fits, saying which limit to lower.
    """
    bounds: Limits = limits or engine.profile
    profile, keys = engine.profile, bucket_keys(engine.profile, limits)
    whole = keys == bucket_keys(profile)
    fixed = MemoryPlan(
        weight_offsets(engine)[1],
        aligned(engine.arena if whole else max(arena_top(engine, *bucket) for bucket in _buckets(engine, keys))),
        slot_bytes(engine),
        (LIBRARY + LIBRARY_CODE) if calls_library(engine) else 0,
        _graphs(engine, keys, len(single_keys(engine, limits))),
        slot_states(engine, bounds),
        engine.groups,
        (),
        profile.block_size,
        budget,
    )
    blocks = share_blocks(engine, budget - fixed.total, bounds)
    if blocks is None:
        raise ResourceError(_refusal(engine, fixed, bounds))
    return replace(fixed, blocks=blocks)


def share_blocks(engine: Engine, budget: int, limits: Limits) -> tuple[int, ...] | None:
    """Blocks of each group's pool, the dummy included, within so many bytes: as many as the limits can use at most.

    Pools grow in the proportion in which requests of 4 of the widest windows hold blocks (of max_seq_len, where that is
    less), and none below `least_blocks`. None: those are more than the budget.
    """
    size, length = engine.profile.block_size, limits.max_seq_len
    most = 1 + limits.max_batch_size * -(-length // size)
    usual = min(length, 4 * max((group.window for group in engine.groups), default=0) or length)
    parts = [group.blocks(usual, size) for group in engine.groups]
    least = least_blocks(engine, limits)

    def shared(scale: int) -> tuple[int, ...]:
        each = zip(parts, least, strict=True)
        return tuple(max(low, min(most, -(-scale * part // max(parts)))) for part, low in each)

    if kv_bytes(engine, shared(0)) > budget:
        return None
    sizes = range(1 + most * max(parts, default=0) // min(parts, default=1))
    return shared(bisect_right(sizes, budget, key=lambda scale: kv_bytes(engine, shared(scale))) - 1)


def least_blocks(engine: Engine, limits: Limits, max_seq_len: int | None = None) -> tuple[int, ...]:
    """Blocks of each group's pool, the dummy included, for one request of max_seq_len, whose prompt comes in chunks as
    long as a step may be."""
    length, size = max_seq_len or limits.max_seq_len, engine.profile.block_size
    return tuple(1 + group.blocks(length, size, limits.max_num_tokens) for group in engine.groups)


def kv_bytes(engine: Engine, blocks: Iterable[int]) -> int:
    """Of so many blocks of each group."""
    return sum(n * group.unit_bytes for n, group in zip(blocks, engine.groups, strict=True))


def request_bytes(engine: Engine, limits: Limits) -> int:
    """KV of one request of max_seq_len, at most, without the dummies; and its state by slot."""
    sizes = limits.max_seq_len, engine.profile.block_size, limits.max_num_tokens
    return sum(group.request_bytes(*sizes) for group in (*engine.groups, *engine.by_slot))


def slot_states(engine: Engine, limits: Limits) -> int:
    """Of states that have a place for each slot."""
    sizes = {"N": limits.max_batch_size}
    return sum(aligned(node.types[0].nbytes(sizes)) for group in engine.by_slot for node in group.states)


def blocks_said(facts: Mapping[str, Any]) -> str:
    """For people: "9 blocks", or of each group."""
    groups = facts["kv_groups"]
    if len(groups) < 2:
        return f"{facts['kv_blocks']} blocks"
    return ", ".join(f"{name} {count} blocks" for name, count in groups.items())


def least_budget(engine: Engine, limits: Limits | None = None) -> int:
    """The least `max_gpu_bytes` with which a run opens: a pool for one request of max_seq_len."""
    bounds: Limits = limits or engine.profile
    whole = plan_run(engine, 1 << 62, limits)
    kv = kv_bytes(engine, least_blocks(engine, bounds))
    return whole.total - aligned(whole.region, PAGE) + aligned(whole.region - whole.kv, PAGE) + kv


def _refusal(engine: Engine, plan: MemoryPlan, limits: Limits) -> str:
    request, room = kv_bytes(engine, least_blocks(engine, limits)), plan.budget - plan.total
    need = plan.total + request
    parts = (
        f"weights {gib(plan.weights)}, buffers of {limits.max_num_tokens} tokens a step {gib(plan.arena)}, one request "
        f"of max_seq_len={limits.max_seq_len} {gib(request)}, the rest "
        f"{gib(plan.slots + plan.by_slot + plan.workspace + plan.graphs)}"
    )
    lengths = range(plan.block_size, limits.max_seq_len, plan.block_size)
    fitting = bisect_right(lengths, room, key=lambda n: kv_bytes(engine, least_blocks(engine, limits, n)))
    if shorter := fitting * plan.block_size:
        lower = f"lower max_seq_len to {shorter}, or max_num_tokens"
    elif plan.total - plan.arena < plan.budget:
        lower = "lower max_num_tokens and max_seq_len"
    else:
        lower = "no limit of the run makes it fit, take a smaller model"
    return (
        f"the engine needs {gib(need)} ({parts}) and {gib(max(plan.budget, 0))} may be used; {lower}, or raise "
        f"gpu_memory_utilization or max_gpu_bytes"
    )


def bucket_keys(profile: Profile, limits: Limits | None = None) -> list[Key]:
    """The capture buckets that steps within the limits run in, the smallest first."""
    bounds: Limits = limits or profile
    keys: list[Key] = []
    for tokens in profile.token_buckets[: 1 + _reach(profile.token_buckets, bounds.max_num_tokens)]:
        rows = profile.logit_buckets(tokens)
        most = min(tokens, bounds.max_batch_size)
        keys += [(tokens, n) for n in rows[: 1 + _reach(rows, most)]]
    return keys


def single_keys(engine: Engine, limits: Limits | None = None) -> list[Key]:
    """The buckets of steps in which every row is a single token that samples, where those need fewer launches."""
    program, rows = engine.programs[DECODE], (limits or engine.profile).max_batch_size
    keys = {engine.profile.bucket(n, n) for n in range(1, rows + 1)}
    plans = [by_bucket for phase in program.phases.values() for by_bucket in phase.plans.values()]
    fewer = (key for key in keys for by_bucket in plans if _is_less(by_bucket[bucket_name(*key)]))
    return sorted(set(fewer))


def _is_less(plan: Plan) -> bool:
    return plan.for_singles is not plan


def _reach(sizes: tuple[int, ...], wanted: int) -> int:
    """The index of the first size that holds it."""
    return next(i for i, size in enumerate(sizes) if size >= wanted)


def weight_offsets(engine: Engine) -> tuple[dict[str, int], int]:
    """Where each weight lies in memory, and the bytes of all."""
    offsets, at = {}, 0
    for name, weight in engine.weights.items():
        offsets[name], at = at, at + aligned(weight.type.nbytes())
    return offsets, at


def slot_bytes(engine: Engine) -> int:
    """Slots, upload and zeroed memory."""
    profile = engine.profile
    return aligned(4 * profile.slots.size) + aligned(4 * profile.upload_size) + aligned(engine.zeroed)


def calls_library(engine: Engine) -> bool:
    """Whether any plan leaves a launch to a library or to torch."""
    return any(isinstance(x, Call) for plan in _plans(engine) for x in plan.launches)


def encoder_sizes(engine: Engine, keys: Iterable[Key]) -> tuple[int, ...]:
    """T of the buckets of an encoder's runs beside steps in these; none where there is no encoder."""
    return tuple(sorted({tokens for tokens, _ in keys})) if engine.encoder else ()


def _buckets(engine: Engine, keys: Sequence[Key]) -> Iterator[tuple[Program, str]]:
    """Of all programs."""
    yield from ((engine.programs[DECODE], bucket_name(*key)) for key in keys)
    yield from ((engine.programs[ENCODE], encoder_bucket(tokens)) for tokens in encoder_sizes(engine, keys))


def arena_top(engine: Engine, program: Program, name: str) -> int:
    """Bytes of the arena that one bucket reaches."""
    sizes, top = program.buckets[name], 0
    for phase_name, phase in program.phases.items():
        offsets = iter(engine.buffers[name][phase_name])
        for node in _work(phase):
            for value in node.outputs:
                if (at := next(offsets)) >= 0:  # else it lives outside the arena
                    top = max(top, at + aligned(value.type.nbytes(sizes)))
            top = max(top, next(offsets) + aligned(phase.plan(node, name).workspace))
    return top


def _graphs(engine: Engine, keys: Sequence[Key], singles: int) -> int:
    """What the driver keeps. A bucket may be captured whole, and in two parts; others have about as many launches as
    the smallest."""
    whole, tail = launches(engine, keys[0]), launches(engine, keys[0], (CONTROLLED_TAIL,))
    count, runs = len(keys), encoder_sizes(engine, keys)
    encoding = sum(_launches(engine.programs[ENCODE], encoder_bucket(runs[0]), FRONT) for _ in runs)
    steps = (2 * count + singles) * whole + count * tail
    return graph_bytes(3 * count + singles + len(runs), steps + encoding, len(engine.kernels))


def launches(engine: Engine, key: Key, phases: Sequence[str] = PLAIN) -> int:
    """Of one step in a bucket, in those phases; a call counts as one."""
    return _launches(engine.programs[DECODE], bucket_name(*key), phases)


def _launches(program: Program, name: str, phases: Sequence[str]) -> int:
    return sum(len(program.phases[p].plan(node, name).launches) for p in phases for node in _work(program.phases[p]))


def graph_bytes(graphs: int, launches: int, binaries: int) -> int:
    """Of so many graphs with so many launches in all, and loaded kernels."""
    return aligned(graphs * GRAPH + GRAPH_LAUNCH * launches + BINARY * binaries, PAGE)


def _work(phase: Phase) -> list[Node]:
    return [node for node in phase.graph.nodes if not node.is_leaf]


def _plans(engine: Engine) -> Iterable[Any]:
    for phase in (phase for program in engine.programs.values() for phase in program.phases.values()):
        for by_bucket in phase.plans.values():
            yield from by_bucket.values()


def aligned(size: int, to: int = ALIGN) -> int:
    """Rounded up."""
    return -(-size // to) * to


def gib(size: float) -> str:
    """1.5 GiB, or 20 MiB where that says more."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"
