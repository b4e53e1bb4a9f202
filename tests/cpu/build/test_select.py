"""Selection: timing decides, wrong numbers disqualify, layouts follow, and the same question is asked once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.compiler.select import NoCompiler, Selector
from penstock.compiler.timing import time_cpu
from penstock.compiler.timing_cache import TimingCache
from penstock.engine.device import CPU, Device
from penstock.engine.profile import Profile
from penstock.engine.program import Call, Site, Sizes
from penstock.errors import SelectionError
from penstock.ir import Graph, emit, leaf, tensor
from penstock.kernels import calls, layouts, registry
from penstock.kernels.tactic import PARTS, REFERENCE, Config, Draft, Tactic, whole_call

PROFILE = Profile(4, 16, 64)


def graph() -> Graph:
    x = leaf("input", "x", tensor("f32", "T", 64))
    w = leaf("weight", "w", tensor("f32", 128, 64))
    return Graph(emit("linear_glu", x, w, act="silu").outputs, ("y",))


SITE = Site.of(graph().outputs[0].node)


def select(pins: Mapping[str, str] | None = None, cache: TimingCache | None = None, timer: Any = time_cpu) -> Selector:
    selector = Selector(PROFILE, CPU, timer, NoCompiler(), cache or TimingCache(None), pins or {})
    selector.run([graph()])
    return selector


def chosen(selector: Selector) -> str:
    return selector.plan(SITE, PROFILE.sizes(8, 1)).tactic


@contextmanager
def slowed(monkeypatch: pytest.MonkeyPatch, *ops: str) -> Iterator[None]:
    """The references of these ops take 20 ms more."""
    plain = calls.CALLS["reference"]

    def slow(call: Call, *rest: Any) -> Any:
        if call.op in ops:
            time.sleep(0.02)
        return plain(call, *rest)

    with monkeypatch.context() as patch:
        patch.setitem(calls.CALLS, "reference", slow)  # type: ignore[arg-type]
        yield


def test_every_fused_site_is_timed_against_its_parts() -> None:
    tried = {row.tactic for row in select().result.rows if row.site == SITE.key}
    assert tried == {REFERENCE, PARTS}


def test_slowing_the_winner_flips_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    with slowed(monkeypatch, "linear_glu"):
        assert chosen(select()) == PARTS
    with slowed(monkeypatch, "packed_glu", "split"):
        assert chosen(select()) == REFERENCE
    free = {row.tactic: row.timing.median_us for row in select().result.rows if row.site == SITE.key}
    assert max(free.values()) < 20_000, "with nothing slowed both are in the race again"


class Quick(Tactic):
    """Another name for the reference's call, in a layout of its own."""

    op, name = "linear_glu", "quick"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return None

    def layouts(self, site: Site, config: Config) -> Mapping[int, str]:
        return {1: "test_flipped"}

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        return Draft((whole_call("quick", site),))


class Wrong(Quick):
    name = "wrong"

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        return Draft((whole_call("wrong", site),))


@contextmanager
def registered(monkeypatch: pytest.MonkeyPatch, tactic: Tactic, function: Any) -> Iterator[None]:
    if "test_flipped" not in layouts.known():
        layouts.register("test_flipped", layouts.Layout(lambda w: w.flip(0), lambda w: w.flip(0)))
    with monkeypatch.context() as patch:
        patch.setitem(calls.CALLS, tactic.name, function)  # type: ignore[arg-type]
        registry.register(tactic)
        try:
            yield
        finally:
            registry.unregister(tactic)


def unpacked(call: Call, inputs: Any, outputs: Any, sizes: Any) -> Any:
    """The reference on the weight that it is given packed, when it is timed as in a step."""
    return calls.reference(call, [inputs[0], inputs[1].flip(0)], None, sizes)


def test_a_users_tactic_competes_brings_its_layout_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with slowed(monkeypatch, "linear_glu", "packed_glu", "split"), registered(monkeypatch, Quick(), unpacked):
        selector = select()
        assert chosen(selector) == "quick"
        assert selector.result.layouts[SITE.key] == {1: "test_flipped"}
    assert chosen(select()) in (REFERENCE, PARTS), "once it is gone, what is left is selected"


def test_wrong_numbers_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(call: Call, inputs: Any, outputs: Any, sizes: Any) -> Any:
        (y,) = unpacked(call, inputs, None, sizes)
        return (y * 1.001,)

    with slowed(monkeypatch, "linear_glu", "packed_glu", "split"), registered(monkeypatch, Wrong(), off):
        selector = select()
        assert chosen(selector) != "wrong"
        (row,) = [r for r in selector.result.rows if r.tactic == "wrong"]
        assert "off by 0.001" in row.timing.refused


def test_a_pin_leaves_no_choice_and_an_unknown_one_is_named() -> None:
    assert chosen(select({"linear_glu": PARTS})) == PARTS
    with pytest.raises(SelectionError, match=r"no tactic 'marvel' for op 'linear_glu'.*parts"):
        select({"linear_glu": "marvel"})


def test_timings_are_kept_between_builds(tmp_path: Path) -> None:
    first = TimingCache(tmp_path / "timings.json")
    before = select(cache=first)
    first.save()

    def never(*_: Any) -> Any:
        raise AssertionError("timed again")

    again = select(cache=TimingCache(tmp_path / "timings.json"), timer=never)
    assert chosen(again) == chosen(before)
    assert all(json.loads((tmp_path / "timings.json").read_text()).values())
