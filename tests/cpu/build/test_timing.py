"""Timing runs every plan on the same state, and passes no wrong number: neither a first one nor a later one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.compiler import timing
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.compiler.timing import CudaTimer, Timing, example_inputs, example_sizes, row_error, time_cpu
from penstock.engine import store
from penstock.engine.device import CPU
from penstock.engine.profile import Profile
from penstock.engine.program import Arg, Call, Plan, Site
from penstock.ir.graph import Type, tensor
from penstock.ir.op import get
from penstock.ir.ops.state import HEADER, SlotLayout
from penstock.kernels import calls, layouts
from penstock.kernels.reference import Reference
from penstock.kernels.tactic import frozen_plan, whole_call
from tests.cpu.build.engines import tiny

L2 = 1 << 16
KV = tensor("f32", "N", 2, 2, 16, 8)
BY_TOKEN = (tensor("i32", "T"),) * 2
TABLE = tensor("i32", "S", "M")
APPEND_SIZES = {"T": 4, "S": 2, "L": 1, "M": 3, "U": 64}


def site(op: str, *types: Type, weights: tuple[int, ...] = (), **attrs: Any) -> Site:
    return Site(op, types, get(op).types(types, attrs), tuple(sorted(attrs.items())), weights)


def state_site(op: str, profile: Profile) -> Site:
    """`prepare` or `commit` of that profile."""
    sampled = (tensor("i32", "L"),) if op == "commit" else ()
    return site(op, tensor("i32", profile.slots.size), tensor("i32", "U"), *sampled, **profile.slots.attrs())


ADD = site("add", tensor("f32", "T", 8), tensor("f32", "T", 8))
TAKE = site("take_rows", tensor("i32", "T", 3), tensor("i32", "L"))
LINEAR = site("linear", tensor("f32", "T", 64), tensor("f32", 32, 64), weights=(1,))
APPEND = site("kv_append", KV, tensor("f32", "T", 16), tensor("f32", "T", 16), *BY_TOKEN, TABLE)


def plan_of(found: Site) -> Plan:
    draft = Reference(found.op).plan(found, {}, CPU, {})
    return frozen_plan("reference", draft, 0)


Step = Callable[[Sequence[Any], Sequence[Any]], None]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Makes a plan out of Python functions of (inputs, outputs)."""

    def plan(found: Site, *functions: Step, workspace: Type | None = None, zeroed: Type | None = None) -> Plan:
        launches = []
        extra = tuple((Arg(kind, 0), t) for kind, t in (("workspace", workspace), ("zeroed", zeroed)) if t)
        for number, function in enumerate(functions):
            name = f"test-{number}"

            def run(call: Call, inputs: Any, outputs: Any, sizes: Any, work: Step = function) -> Any:
                work(inputs, outputs)
                return tuple(outputs)

            monkeypatch.setitem(calls.CALLS, name, run)  # type: ignore[arg-type]
            call = whole_call(name, found)
            launches.append(replace(call, inputs=(*call.inputs, *extra)))
        return Plan("test", tuple(launches), *(t.nbytes() if t else 0 for t in (workspace, zeroed)))

    return plan


class Replays:
    """In place of a CUDA graph: the runs, called one after another when replayed."""

    def __init__(self, runs: Sequence[Callable[[], None]]) -> None:
        self.runs, self.replayed = runs, 0
        made.append(self)

    def replay(self) -> None:
        self.replayed += 1
        for run in self.runs:
            run()


made: list[Replays] = []


class Mark:
    """In place of a CUDA event: every stretch takes as long."""

    milliseconds = 0.16

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Mark) -> float:
        return self.milliseconds


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaTimer]:
    """The timer of a GPU, on the CPU's memory."""
    monkeypatch.setattr(timing, "captured", Replays)
    monkeypatch.setattr(timing, "_wait", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    made.clear()
    yield CudaTimer(replace(CPU, l2_bytes=L2), _no_kernel)
    made.clear()


def _no_kernel(key: str) -> Any:
    raise AssertionError(key)


# --- on a CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_seq_len", [32, 64])
def test_an_engine_for_one_short_request_builds(tmp_path: Path, max_seq_len: int) -> None:
    limits = {"max_batch_size": 1, "max_num_tokens": 16, "max_seq_len": max_seq_len}
    options = BuildOptions(device="cpu", cache_dir=tmp_path / "cache", **limits)  # type: ignore[arg-type]
    built = build(tiny("llama", tmp_path), options)
    assert store.load(built).profile.max_seq_len == max_seq_len


@pytest.mark.parametrize("max_seq_len", [2, 8, 32, 64])
@pytest.mark.parametrize("op", ["prepare", "commit"])
def test_the_slots_of_short_sequences_are_timed(op: str, max_seq_len: int) -> None:
    profile = Profile(1, 16, max_seq_len)
    found = state_site(op, profile)
    assert time_cpu(found, profile.sizes(8, 1), plan_of(found)).ok


def test_every_repeat_starts_from_the_same_state(steps: Callable[..., Plan]) -> None:
    profile = Profile(2, 16, 32)
    found = state_site("commit", profile)
    lengths = []

    def commit(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        lengths.append(inputs[0][:2].tolist())
        get("commit").reference(*inputs, **dict(found.attrs))

    plan = steps(found, commit)
    seen: list[Any] = []

    def run(call: Call, inputs: Any, outputs: Any, sizes: Any) -> Any:
        seen.append(inputs[0][:2].tolist())
        return (get("commit").reference(*inputs, **dict(found.attrs)),)

    calls.CALLS["test-0"] = run  # on a CPU a call returns what it made
    assert time_cpu(found, profile.sizes(8, 2), plan).ok
    assert seen == [[0, 0]] * (1 + timing.REPEATS)


# --- examples -------------------------------------------------------------------------------------------------------


def test_a_commits_example_lengthens_each_row_by_one() -> None:
    profile = Profile(3, 64, 32)
    found = state_site("commit", profile)
    slots, upload, _ = example_inputs(found, profile.sizes(64, 3), "cpu")
    assert upload[:HEADER].tolist() == [3, 3, 3, 1]
    layout = SlotLayout(**dict(found.attrs))  # type: ignore[arg-type]
    for _ in range(timing.MOST):
        get("commit").reference(slots, upload, torch.zeros(3, dtype=torch.int32), **dict(found.attrs))
    assert slots[: layout.num_slots].tolist() == [timing.MOST] * 3 and layout.history > timing.MOST


@pytest.mark.parametrize("block", [16, 64, 128])
def test_a_pool_has_blocks_of_the_sites_size(block: int) -> None:
    kv = tensor("bf16", "N", 2, 32, block, 128)
    found = Site("attention", (tensor("bf16", "T", 4096), kv), ())
    sizes = {"T": 8192, "S": 64, "M": 4096 // block}
    room = (example_sizes(found, sizes)["N"] - 1) // 64 * block
    assert 1024 + 128 <= room < 1024 + 128 + block


@pytest.mark.parametrize(("tokens", "sequences", "length"), [(8192, 1, 4096), (20, 2, 9), (33, 2, 16), (5, 3, 2)])
def test_steps_longer_than_the_block_tables_are_cut(tokens: int, sequences: int, length: int) -> None:
    """More tokens in a step than its requests may have, as a profile of few short requests allows."""
    profile = Profile(sequences, tokens, length, 16)
    sizes = profile.sizes(tokens, 1)
    kv, k, v, positions, rows, table = example_inputs(APPEND, sizes, "cpu")
    live = rows >= 0
    assert len(rows) == tokens and int(live.sum()) == min(tokens, sequences * profile.table_width * 16)
    assert int(positions.max()) < table.shape[1] * 16 and not positions[~live].any()
    get("kv_append").reference(kv, k, v, positions, rows, table)


# --- the gate -------------------------------------------------------------------------------------------------------


def test_errors_are_by_row_and_found_in_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    want = torch.full((6, 2, 4), 2.0)
    want[0, 0, 0] = 1000.0
    got = want.clone()
    got[5, 1, 3] += 0.5
    got[0, 0, 1] += 1.0
    whole = row_error(got, want)
    monkeypatch.setattr(timing, "SLICE", 5)
    assert row_error(got, want) == whole == 0.25
    got[3, 0, 0] = torch.nan
    assert row_error(got, want) == torch.inf
    assert row_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0.0 == row_error(torch.zeros(3, 0), torch.zeros(3, 0))


def test_infinities_have_to_agree_and_hide_no_other_fault() -> None:
    want = torch.tensor([[2.0, -torch.inf, 1.0], [-torch.inf] * 3])
    assert row_error(want.clone(), want) == 0.0
    for column, wrong, least in ((2, 1.5, 0.25), (1, 0.0, 1e30), (1, torch.inf, 1e30), (0, -torch.inf, 1e30)):
        got = want.clone()
        got[0, column] = wrong
        assert row_error(got, want) >= least
    assert row_error(torch.zeros(2, 3), want) > 1e30


# --- on a GPU, but for the graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "sizes"),
    [
        (ADD, {"T": 3}),
        (TAKE, {"T": 4, "L": 2}),
        (LINEAR, {"T": 2}),
        (APPEND, APPEND_SIZES),
        *((state_site(op, p), p.sizes(8, 1)) for op in ("prepare", "commit") for p in (Profile(1, 8, 32),)),
    ],
    ids=lambda x: x.op if isinstance(x, Site) else "",
)
def test_right_plans_pass_and_are_timed_by_the_launch(timer: CudaTimer, found: Site, sizes: Mapping[str, int]) -> None:
    result = timer(found, sizes, plan_of(found))
    (graph,) = made
    assert timing.LEAST <= len(graph.runs) <= timing.MOST
    assert result == Timing(160 / len(graph.runs), 0.0)
    assert graph.replayed == timing.WARM_UP + timing.REPEATS + 1
    assert timer(found, sizes, plan_of(found)).ok, "and again, on what the first has left"


def test_a_weight_is_packed_as_the_plan_reads_it(timer: CudaTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every copy that launches take in turn, and by its layout alone."""
    flipped = layouts.Layout(lambda w: w.flip(0), lambda w: w.flip(0))
    monkeypatch.setitem(layouts._LAYOUTS, "flipped", flipped)

    def run(call: Call, inputs: Any, outputs: Any, sizes: Any) -> Any:
        given = [inputs[0], inputs[1].flip(0)]
        return calls.reference(call, given, outputs, sizes)

    monkeypatch.setitem(calls.CALLS, "test-flipped", run)  # type: ignore[arg-type]
    plan = Plan("test", (whole_call("test-flipped", LINEAR),))
    for time in (timer, time_cpu):
        assert "off by" in time(LINEAR, {"T": 3}, plan).refused
        assert time(LINEAR, {"T": 3}, plan, math.inf, ((1, "flipped"),)).ok


def test_what_is_far_behind_the_best_is_repeated_less(timer: CudaTimer) -> None:
    near = timer(ADD, {"T": 3}, plan_of(ADD), 10 / timing.BEHIND)
    behind = timer(ADD, {"T": 3}, plan_of(ADD), 9.9 / timing.BEHIND)
    assert near == behind == Timing(10.0, 0.0)
    replayed = [graph.replayed - timing.WARM_UP - 1 for graph in made]
    assert replayed == [timing.REPEATS, timing.FEW]


def test_a_long_launch_is_timed_in_few_replays_of_few_launches(
    timer: CudaTimer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mark, "milliseconds", 5.0)
    assert timer(ADD, {"T": 3}, plan_of(ADD)) == Timing(5000 / timing.ENOUGH, 0.0)
    (graph,) = made
    assert len(graph.runs) == timing.ENOUGH and graph.replayed == 1 + timing.FEW + 1


@pytest.mark.parametrize("columns", [64, 512, 4096])
def test_launches_read_other_copies_until_the_cache_is_covered(timer: CudaTimer, columns: int) -> None:
    found = site("linear", tensor("f32", "T", columns), tensor("f32", 32, columns), weights=(1,))
    assert timer(found, {"T": 1}, plan_of(found)).ok
    case = timer._case(found, {"T": 1})
    assert len({copy[1].data_ptr() for copy in case.copies}) == len(case.copies) == case.launches
    assert len({copy[0].data_ptr() for copy in case.copies}) == 1
    assert case.launches == {64: 16, 512: 8, 4096: 8}[columns]


def test_copies_are_bounded_and_taken_in_turn(timer: CudaTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SPACE", 3 * LINEAR.inputs[1].nbytes())
    assert timer(LINEAR, {"T": 1}, plan_of(LINEAR)).ok
    case = timer._case(LINEAR, {"T": 1})
    assert (len(case.copies), case.launches) == (3, 16)
    assert timer(APPEND, APPEND_SIZES, plan_of(APPEND)).ok
    assert len(timer._case(APPEND, APPEND_SIZES).copies) == 1


def test_a_pool_that_is_only_read_is_copied_too(timer: CudaTimer) -> None:
    rows = (tensor("i32", "S"),) * 3
    found = site("attention", tensor("f32", "T", 16), KV, *rows, TABLE, heads=2, scale=1.0)
    assert timer(found, APPEND_SIZES, plan_of(found)).ok
    copies = timer._case(found, APPEND_SIZES).copies
    assert len({copy[1].data_ptr() for copy in copies}) == len(copies) >= timing.LEAST


def half(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """The first row alone."""
    outputs[0][:1] = inputs[0][inputs[1].long()][:1]


@pytest.mark.parametrize("token", [0, -1])
def test_an_integer_that_is_never_written_shows(
    timer: CudaTimer, steps: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    monkeypatch.setattr(timing.torch, "empty", _filled(token))  # which keeps what it has found in torch
    assert "off by" in timer(TAKE, {"T": 4, "L": 2}, steps(TAKE, half)).refused


def _filled(value: int) -> Callable[..., Any]:
    """Memory that happens to hold what an example's integers are."""
    return lambda shape, dtype, device: torch.full(shape if isinstance(shape, tuple) else (shape,), value, dtype=dtype)


def test_a_workspace_that_must_hold_zeros_shows(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    def accumulate(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        outputs[0].copy_(inputs[0] + inputs[1] + inputs[2])

    plan = steps(ADD, accumulate, workspace=tensor("f32", 3, 8))
    assert "off by inf" in timer(ADD, {"T": 3}, plan).refused


def test_zeroed_memory_must_be_left_zero(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    def use(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        outputs[0].copy_(inputs[0] + inputs[1] + inputs[2])
        inputs[2].add_(1)

    def leave(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        inputs[2].zero_()

    assert timer(ADD, {"T": 3}, steps(ADD, use, leave, zeroed=tensor("f32", 3, 8))).ok
    refused = timer(ADD, {"T": 3}, steps(ADD, use, zeroed=tensor("f32", 3, 8))).refused
    assert refused == "leaves 48 of its 96 zeroed bytes other than zero"


def test_state_is_not_poisoned_and_what_stands_beside_it_is(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    profile = Profile(1, 8, 32)
    found = state_site("prepare", profile)
    sizes = profile.sizes(8, 1)

    def write_alone(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        get("prepare").reference(*inputs, **dict(found.attrs), sizes=sizes)

    refused = timer(found, sizes, steps(found, write_alone)).refused
    assert refused.startswith("result 1 is off")


def test_a_kernel_that_does_not_wait_shows_in_the_replay(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    """The second half runs before the first, once launches may overlap; memory holds right numbers from runs before."""
    x = tensor("f32", "T", 8)

    def first(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        inputs[2].copy_(inputs[0] + inputs[1])

    def second(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        outputs[0].copy_(inputs[2])

    assert timer(ADD, {"T": 3}, steps(ADD, first, second, workspace=replace(x, shape=(3, 8)))).ok
    made.clear()
    count = [0]

    def early(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        count[0] += 1
        (first if count[0] == 1 else second)(inputs, outputs)

    def late(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        (second if count[0] == 1 else first)(inputs, outputs)

    refused = timer(ADD, {"T": 3}, steps(ADD, early, late, workspace=replace(x, shape=(3, 8)))).refused
    assert refused.startswith("in a replay result 0 is off by inf")


def test_state_is_put_back_between_replays(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    profile = Profile(1, 8, 32)
    found, lengths = state_site("commit", profile), set()

    def commit(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        lengths.add(int(inputs[0][0]))
        get("commit").reference(*inputs, **dict(found.attrs))

    for _ in range(2):
        assert timer(found, profile.sizes(8, 1), steps(found, commit)).ok
    assert lengths == {0}


def test_results_of_a_replay_that_differ_within_the_tolerance_pass(
    timer: CudaTimer, steps: Callable[..., Plan]
) -> None:
    count = [0]

    def unsteady(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        count[0] += 1
        outputs[0].copy_((inputs[0] + inputs[1]) * (1 + count[0] % 3 * 1e-6))

    assert timer(ADD, {"T": 3}, steps(ADD, unsteady)).ok


def test_a_state_that_a_replay_leaves_wrong_shows(timer: CudaTimer, steps: Callable[..., Plan]) -> None:
    count = [0]

    def append(inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        count[0] += 1
        if count[0] == 1:
            get("kv_append").reference(*inputs)

    assert "in a replay result 0" in timer(APPEND, APPEND_SIZES, steps(APPEND, append)).refused
