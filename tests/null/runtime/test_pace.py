"""The prompt budget of a latency target: what an engine's timings predict, at borders, and as steps correct it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.device import CPU, H200, Device
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.engine.program import Phase, Plan, Program, Site
from penstock.engine.step_time import StepTime
from penstock.engine.timings import Timings
from penstock.errors import OptionError
from penstock.ir import Graph, emit, leaf, tensor
from penstock.runtime.pace import LEAST_CHUNK, MOST_RATIO, SURPRISE, Pace, _Curve, _Timed

PROFILE = Profile(max_batch_size=64, max_num_tokens=2048, max_seq_len=8192)
LAYERS = 4


@cache
def program(device: str = "cuda") -> Program:
    """Some layers of one product over T, one of another tactic than the fastest, and a head over L."""
    h = leaf("input", "x", tensor("f32", "T", 8))
    for layer in range(LAYERS):
        h = emit("linear", h, leaf("weight", f"w{layer}", tensor("f32", 8, 8)))[0]
    rows = emit("take_rows", h, leaf("input", "rows", tensor("i32", "L")))[0]
    head = emit("linear", rows, leaf("weight", "head", tensor("f32", 32, 8)))[0]
    buckets = PROFILE.buckets() if device == "cuda" else PROFILE.unpadded
    graphs = {"forward": Graph((head,), ("logits",)), "controlled": Graph((head,), ("logits",))}
    phases = {
        name: Phase(g, {Site.of(n).key: dict.fromkeys(buckets, Plan("ours", ())) for n in g.nodes if not n.is_leaf})
        for name, g in graphs.items()
    }
    return Program(phases, buckets)


def timings(tokens: Callable[[int], float], rows: Callable[[int], float] = lambda n: 5.0) -> Timings:
    """Microseconds of the product over T, and of the head over L; `other` is faster and was not chosen."""
    found: dict[str, dict[str, object]] = {}
    for node in program().phases["forward"].graph.nodes:
        if node.is_leaf or node.op == "take_rows":
            continue
        by_rows = "L" in node.types[0].symbols
        sizes = PROFILE.logit_buckets(2048) if by_rows else PROFILE.tuned_buckets
        points = {
            f"{'L' if by_rows else 'T'}{size}": {
                "ours": {"median_us": (rows if by_rows else tokens)(size), "spread_us": 0.1},
                "other": {"median_us": 0.01, "spread_us": 0.1},
                "bad": {"refused": "it was off"},
            }
            for size in sizes
        }
        found[Site.of(node).key] = {"points": points, "cannot": {}}
    return found


def engine(device: Device = H200) -> Engine:
    return Engine({}, PROFILE, "f32", device, {}, {}, {"decode": program(device.kind)}, {})


def pace(target: float, tokens: Callable[[int], float] = lambda t: 25.0 + t) -> Pace:
    """By default a step of T tokens takes 100 + 4 T + 5 microseconds."""
    return Pace(engine(), target, timings(tokens))


def test_a_step_is_the_sum_of_its_nodes_as_chosen() -> None:
    known = StepTime.of(program(), PROFILE, timings(lambda t: 10.0 + t, lambda n: float(n)))
    assert known is not None
    assert known.tokens == {t: pytest.approx(LAYERS * (10 + t) / 1e6) for t in PROFILE.tuned_buckets}
    assert known.rows == {n: pytest.approx(n / 1e6) for n in (1, 8, 64)}


def test_an_engine_that_was_not_timed_by_size_predicts_nothing() -> None:
    assert StepTime.of(program(), PROFILE, {}) is None
    assert StepTime.of(program("cpu"), PROFILE, timings(lambda t: 1.0)) is None


def test_of_a_tactic_not_timed_at_a_size_the_fastest_counts() -> None:
    partial = {
        site: {"points": {point: {"other": timed["other"]} for point, timed in entry["points"].items()}}
        for site, entry in timings(lambda t: 1.0).items()
    }
    known = StepTime.of(program(), PROFILE, partial)
    assert known is not None and known.tokens[64] == pytest.approx(LAYERS * 0.01 / 1e6)


def test_the_largest_bucket_within_the_target_is_filled() -> None:
    border = (100 + 4 * 480 + 5) / 1e6  # what the bucket of 480 takes
    assert pace(border * 1.0001).budget(32) == 480 - 32
    assert pace(border * 0.9999).budget(32) == 448 - 32
    assert pace(1.0).budget(32) == 2048 - 32


def test_a_step_that_takes_just_the_target_is_within_it() -> None:
    exact = pace(1.0)._clock.seconds(480, 33)
    assert pace(exact).budget(32) == 480 - 32


def test_logits_of_many_rows_take_their_part() -> None:
    """Up to 8 give logits for nothing, 9 to 64 take as long as 200 tokens; a prompt that ends is one of them."""
    here = Pace(engine(), (100 + 4 * 480) / 1e6 * 1.0001, timings(lambda t: 25.0 + t, lambda n: 800.0 * (n > 8)))
    assert 7 + here.budget(7) == 480 and 8 + here.budget(8) == 256


def test_a_step_of_one_token_more_runs_as_the_next_bucket() -> None:
    """With 33 decoding the step runs as 64 tokens: 31 of a prompt cost nothing. With 32 any costs 32."""
    fits_64 = (100 + 4 * 64 + 5) / 1e6 * 1.0001
    assert pace(fits_64).budget(33) == 31 and pace(fits_64).budget(32) == 32
    assert pace(fits_64).budget(40) == 24 and pace(fits_64).budget(48) == LEAST_CHUNK


def test_where_the_target_is_out_of_reach_a_short_chunk_goes_on() -> None:
    hopeless = pace(1e-6)
    assert hopeless.budget(8) == 24 - 8 and hopeless.budget(9) == 32 - 9 and hopeless.budget(60) == 96 - 60
    assert hopeless.budget(2040) == LEAST_CHUNK, "what the step has no room for is the scheduler's to cut"


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.integers(1, 2000), st.integers(1, 2000))
def test_never_less_in_a_step_for_more_decoders_or_a_longer_target(a: float, b: float, n: int, m: int) -> None:
    (short, long), (few, many) = sorted((a, b)), sorted((n, m))
    assert LEAST_CHUNK <= pace(short).budget(n) <= pace(long).budget(n)
    assert few + pace(a).budget(few) <= many + pace(a).budget(many)


@given(st.floats(1e-4, 1e-2), st.integers(1, 64))
def test_within_the_target_more_decoders_leave_less_to_prompts(target: float, n: int) -> None:
    here = pace(target)
    size = n + here.budget(n)
    if size >= n + 1 + LEAST_CHUNK + 32 * (size <= 512):
        assert here.budget(n + 1) <= here.budget(n)
        assert 100 + 4 * size + 5 <= target * 1e6 * 1.0001


@given(st.dictionaries(st.integers(1, 999), st.floats(1e-6, 1.0), min_size=1), st.integers(1, 1200))
def test_a_curve_never_falls(known: dict[int, float], size: int) -> None:
    curve = _Curve(known)
    assert curve.at(size) <= curve.at(size + 1) * (1 + 1e-9) and curve.next(size) <= curve.next(size + 1)
    assert all(curve.at(at) >= value for at, value in known.items())


def test_between_timed_sizes_a_step_lies_on_the_line() -> None:
    curve = _Curve({512: 10.0, 2048: 40.0})
    assert (curve.at(1), curve.at(512), curve.at(1280), curve.at(2048)) == (10.0, 10.0, 25.0, 40.0)
    assert curve.at(4096) == 80.0


def test_steps_slower_than_predicted_make_the_chunks_shorter() -> None:
    here = pace((105 + 4 * 480) / 1e6 * 1.0001)
    for _ in range(20):
        here.observe(480, 33, 2 * (105 + 4 * 480) / 1e6)
    assert here.budget(32) == 224 - 32, "twice 105 + 4 T fits where T is 226 or less"
    for _ in range(1000):
        here.observe(224, 33, (105 + 4 * 224) / 1e6)
    assert here.budget(32) == 480 - 32, "it comes back to where it was"


def test_steps_without_prompts_say_nothing_of_those_with() -> None:
    here = pace(1e-3)
    before = here.budget(8)
    here.observe(8, 8, 1.0)
    assert here.budget(8) == before


def test_a_disturbance_counts_as_a_few_times_the_prediction() -> None:
    here = pace(1e-2)
    here.observe(64, 8, 60.0)
    assert isinstance(here._clock, _Timed) and here._clock.ratio <= (1 + SURPRISE) / 2
    for _ in range(50):
        here.observe(64, 8, 60.0)
    assert here._clock.ratio == MOST_RATIO


@pytest.mark.parametrize("device", [H200, CPU])
def test_without_timings_nothing_is_known_before_a_step_has_run(device: Device) -> None:
    here = Pace(engine(device), 0.1)
    assert here.budget(8) == LEAST_CHUNK
    here.observe(8, 8, 0.01)
    assert here.budget(8) == LEAST_CHUNK, "prompts have not been seen yet"
    here.observe(24, 9, 0.02)
    assert here.budget(8) == (48 if device is CPU else 32) - 8, "no more than twice what was seen"


def test_where_prompts_seem_to_cost_nothing_a_token_still_costs_a_little() -> None:
    here = Pace(engine(CPU), 0.49)
    here.observe(8, 8, 1.0)
    here.observe(40, 9, 0.5)
    assert here.budget(8) == 27 - 8, "12.8 tokens fewer are taken to save 0.01 s"


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize(("base", "each"), [(100, 4.0), (5000, 10.0), (300, 0.5), (0, 20.0)])
def test_on_a_device_with_noise_few_steps_are_late(timed: bool, base: float, each: float) -> None:
    """The device is not as timed: slower or faster by several times, with half as much again for tokens beyond 512; one
    step in 200 is disturbed. Prompts keep going, and use what the target leaves."""
    draw = random.Random(3)
    target = (base + each * 600) / 1e6
    here = pace(target) if timed else Pace(engine(CPU), target)
    late, sizes, steps = 0, [], 2000
    for step in range(steps):
        decoding = draw.randint(8, 48)
        tokens = min(decoding + here.budget(decoding), 2048)
        runs_as = PROFILE.bucket(tokens, 1)[0] if timed else tokens
        seconds = (base + each * (runs_as + 0.5 * max(0, runs_as - 512))) / 1e6 * draw.uniform(0.97, 1.03)
        here.observe(tokens, decoding + 1, seconds * (20 if draw.random() < 0.005 else 1))
        late += seconds > 1.1 * target
        if step >= steps // 2:
            sizes.append(runs_as)
    assert late <= 0.01 * steps
    assert sum(sizes) / len(sizes) >= (300 if timed else 450), "the target is used"


@pytest.mark.parametrize("target", [0, -1.0, nan, inf, True, "0.1"])
def test_a_target_that_is_no_time_is_refused(target: float) -> None:
    with pytest.raises(OptionError, match=r"inter_token_latency_target=.* give seconds"):
        Pace(engine(), target)
