"""The byte/FLOP model: what tiles show to be hopeless is left out, and no winner that was ever measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.workload import write_model
from penstock.compiler.build import read_model
from penstock.compiler.candidates import candidates
from penstock.compiler.estimate import HOPELESS, LIBRARY, estimate, judged, least, promising
from penstock.compiler.options import BuildOptions
from penstock.compiler.select import Selector, all_sites
from penstock.compiler.timing import Timing
from penstock.compiler.timing_cache import TimingCache
from penstock.engine.device import H200
from penstock.engine.program import Plan, Site, Sizes
from penstock.ir.graph import Graph, tensor
from penstock.kernels.tactic import Draft, KernelUse, TritonKernel, whole_call

RECORDED = Path(__file__).parents[3] / "bench" / "results" / "h200" / "llama3.1-8b.timing.json"
X, W, Y = tensor("bf16", "T", 4096), tensor("bf16", 4096, 4096), tensor("bf16", "T", 4096)
LINEAR = Site("linear", (X, W), (Y,), (), (1,))


def tiled(tokens: int, rows: int, programs: int, launches: int = 1) -> Draft:
    constants = (("N", 4096), ("K", 4096), ("ROWS", rows), ("TOKENS", tokens))
    use = KernelUse(TritonKernel("module:kernel", (), constants), (programs, 1, 1), ())
    return Draft((use,) * launches)


def microseconds(tokens: int, draft: Draft) -> float:
    found = estimate(LINEAR, {"T": tokens}, H200, draft)
    assert found is not None
    return found


def test_idle_processors_padding_waves_and_launches_cost() -> None:
    full = microseconds(1, tiled(1, 4, 1024))
    assert full == pytest.approx(least(LINEAR, {"T": 1}), rel=0.01), "bound by the weights' bytes"
    assert microseconds(1, tiled(1, 256, 16)) > 8 * (full - 1.5)
    assert microseconds(1, tiled(1, 4, 1024, launches=3)) == pytest.approx(full + 3.0)
    assert microseconds(4096, tiled(4096, 64, 64 * 32)) < microseconds(4097, tiled(4096, 64, 64 * 32))
    whole, last = (microseconds(8192, tiled(128, 128, n)) for n in (132 * 16, 132 * 16 + 1))
    assert last > 1.05 * whole, "one program more makes a wave of its own"
    assert microseconds(64, tiled(8, 4, 1024)) > microseconds(64, tiled(64, 64, 1024)), "without matrix units"


def test_what_says_nothing_about_its_tiles_has_no_estimate_and_stays() -> None:
    library, other = Draft((whole_call("cublas", LINEAR),)), Draft(())
    drafts = [("idle", tiled(64, 256, 16)), ("good", tiled(64, 64, 256)), ("library", library), ("other", other)]
    assert estimate(LINEAR, {"T": 64}, H200, library) is estimate(LINEAR, {"T": 64}, H200, other) is None
    assert promising(drafts, LINEAR, {"T": 64}, H200) == ("good", "library", "other")


def test_a_library_is_taken_to_come_near_the_least() -> None:
    """So that tiles of which none is any good need not all be compiled, to lose against it."""
    idle = tiled(64, 256, 16)
    assert microseconds(64, idle) > HOPELESS * LIBRARY * least(LINEAR, {"T": 64})
    assert promising([("idle", idle)], LINEAR, {"T": 64}, H200) == ("idle",)
    library = ("library", Draft((whole_call("cublas", LINEAR),)))
    assert promising([("idle", idle), library], LINEAR, {"T": 64}, H200) == ("library",)


def test_only_what_is_far_behind_is_hopeless() -> None:
    """Launches stand for time: 9.5 us of bytes and 1.5 us each."""
    by_launches = [(n, tiled(1, 4, 1024, n)) for n in range(1, 12)]
    best = microseconds(1, by_launches[0][1])
    kept = promising(by_launches, LINEAR, {"T": 1}, H200)
    assert kept == tuple(n for n in range(1, 12) if best + 1.5 * (n - 1) <= 1.5 * best) and 1 < len(kept) < 11


def test_what_is_left_out_says_by_which_estimates() -> None:
    drafts = [("idle", tiled(64, 256, 16)), ("good", tiled(64, 64, 256))]
    (_, idle), (_, good) = judged(drafts, LINEAR, {"T": 64}, H200)
    own, best = (microseconds(64, draft) for _, draft in drafts)
    assert idle == f"not tried: an estimated {own:.1f} us, the best an estimated {best:.1f} us" and good == ""


def test_an_op_of_several_products_takes_the_sum() -> None:
    """Each product reads the share of its weights; a second one that leaves processors idle costs by itself."""
    first, second, idle = (tiled(1, rows, n).steps[0] for rows, n in ((4, 1024), (4, 1024), (256, 16)))
    one = microseconds(1, Draft((first,)))
    assert microseconds(1, Draft((first, second))) == pytest.approx(one + 1.5), "the same bytes, one launch more"
    assert microseconds(1, Draft((first, idle))) > 4 * one
    whole = tiled(64, 64, 2112).steps[0]
    bound = microseconds(4096, Draft((whole,))) - 1.5
    assert microseconds(4096, Draft((whole, whole))) == pytest.approx(2 * bound + 3.0), "twice the operations"


def test_a_first_launch_that_says_nothing_hides_the_rest() -> None:
    silent = KernelUse(TritonKernel("module:kernel", (), ()), (1, 1, 1), ())
    (said,) = tiled(64, 64, 256).steps
    assert estimate(LINEAR, {"T": 64}, H200, Draft((silent, said))) is None
    assert microseconds(64, Draft((said, silent))) == pytest.approx(microseconds(64, Draft((said,))) + 1.5)


class Replayed:
    """A timer and compiler that know what was measured once, and refuse the rest."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded

    def submit(self, kernels: Any, progress: Any) -> None: ...

    def refusals(self, keys: Any) -> dict[str, str]:
        return {}

    def time(self, site: Site, sizes: Sizes, plan: Plan, best_us: float, layouts: object = ()) -> Timing:
        point = f"T{sizes['T']}"
        points = self.recorded.get(site.key, {"points": {}})["points"]
        found = points.get(point if point in points else f"L{sizes['L']}", {}).get(plan.tactic, {})
        if not points:
            return Timing(1.0)  # an op that was not there then
        return Timing(found["median_us"]) if "median_us" in found else Timing(refused="was not measured")


def replayed(selector: Selector, graphs: tuple[Graph, ...]) -> tuple[dict[tuple[str, str], set[str]], int]:
    """Whom a build would have tried, by site and point, and how many rows say why not; ranking needs no times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selector, "_rank", lambda site, force_plain: None)
        patch.setattr(selector, "_one_by_one", lambda site, sizes: 0.0)
        patch.setattr(selector, "_draft", lambda c, site, sizes: c.draft(site, sizes, H200, lambda part: Draft(())))
        rows = selector.run(graphs).rows
    tried: dict[tuple[str, str], set[str]] = {}
    for row in (r for r in rows if not r.timing.refused.startswith("not tried")):
        tried.setdefault((row.site, row.point), set()).add(row.tactic)
    return tried, len(rows) - sum(map(len, tried.values()))


def test_the_measured_winner_is_always_among_those_that_are_tried(tmp_path: Path) -> None:
    """The best of the recorded times, of the configurations that there still are."""
    options = BuildOptions(weights="random", device="cuda", max_seq_len=4096)
    draft = read_model(write_model("llama3.1-8b", tmp_path), options, H200).draft
    recorded = json.loads(RECORDED.read_text())
    shop, graphs = Replayed(recorded), tuple(draft.graphs.values())
    selector = Selector(draft.profile, H200, shop.time, shop, TimingCache(None), {})
    (tried, left_out), seen, hidden = replayed(selector, graphs), 0, {}
    assert left_out > 0, "whom the estimate leaves out, the table names"
    for key, site in all_sites(graphs).items():
        for point, sizes in selector.points(site).items():
            cell = recorded.get(key, {"points": {}})["points"].get(point, {})
            every = [c.name for c in candidates(site, sizes, H200, {})[0]]
            times = {name: cell[name]["median_us"] for name in every if "median_us" in cell.get(name, {})}
            if times:
                seen += 1
                best = min(times, key=lambda name: times[name])
                if best not in tried[key, point]:
                    near = min(times[name] for name in tried[key, point] & times.keys())
                    hidden[key, point] = (best, times[best], near)
    assert seen > 100, "the record has little to do with today's tactics: measure it again"
    assert not hidden
