"""Inspecting an engine for a GPU that is not here: the build's workshop is replaced, everything else is real."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main
from penstock.compiler import backend, build, weights
from penstock.compiler.candidates import candidates
from penstock.compiler.options import BuildOptions
from penstock.compiler.timing import Timing
from penstock.compiler.weights import compute
from penstock.engine import store
from penstock.engine.device import H200, Device
from penstock.engine.program import Plan, Site, Sizes
from penstock.kernels import compile as compiled
from penstock.kernels.tactic import TritonKernel


class FakeWorkshop:
    """Times are drawn from a hash of what is timed, one tactic is refused, and a kernel is an empty file."""

    gpu = nullcontext()

    def __init__(self, folder: Path, device: Device) -> None:
        self.folder, self.device = folder, device
        self.seconds = {"compile": 1.0, "time": 2.0}

    def roof(self, format: str) -> dict[str, float]:
        return {"read_bytes_per_s": 4e12, "flops_per_s": 7e14}

    def __enter__(self) -> FakeWorkshop:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, kernels: Iterable[TritonKernel], progress: Callable[[], None]) -> None:
        for kernel in kernels:
            binary = compiled.Binary(
                "entry", kernel.num_warps, 0, 0, b"", "", "wgmma" if "matmul" in kernel.source else "fma"
            )
            compiled.store(binary, self.folder, kernel.key(self.device.capability))

    def refusals(self, keys: Iterable[str]) -> dict[str, str]:
        return {}

    def time(self, site: Site, sizes: Sizes, plan: Plan, best_us: float, layouts: object = ()) -> Timing:
        if plan.tactic == "cublas" and site.op == "linear":
            return Timing(refused="too slow to wait for")
        digest = hashlib.sha256(f"{site.key}{dict(sizes)}{plan.tactic}".encode()).digest()
        return Timing(1 + digest[0], 0.5)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    options = BuildOptions(dtype="bfloat16", max_batch_size=16, max_num_tokens=256, cache_dir=folder / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Workshop", FakeWorkshop)
        patch.setattr(build, "detect", lambda _: H200)
        patch.setattr(weights, "compute", lambda weight, source, device: compute(weight, source, "cpu"))
        return build.build(tiny_model, options, folder / "engine")


def inspected(engine: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    capsys.readouterr()
    assert main(["inspect", str(engine), *flags]) == 0
    return capsys.readouterr().out


def test_each_bucket_is_shown_under_the_timed_size_that_it_uses(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, manifest = json.loads(inspected(engine, capsys, "--json")), store.load(engine)
    timing = json.loads((engine / store.TIMING).read_text())
    program = manifest.programs["decode"]
    for node in data["nodes"]:
        plans = program.phases[node["phase"]].plans[node["site"]]
        shown = {bucket: choice for choice in node["choices"] for bucket in choice["buckets"]}
        assert set(shown) == set(plans) == set(program.buckets)
        for bucket, plan in plans.items():
            own, timed = shown[bucket], timing[node["site"]]["points"][shown[bucket]["at"]]
            assert own["tactic"] == plan.tactic and own["median_us"] == timed[plan.tactic]["median_us"]


def test_the_refused_and_the_slower_are_listed(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(inspected(engine, capsys, "--json"))
    linear = next(n for n in data["nodes"] if n["op"] == "linear")
    for choice in linear["choices"]:
        refused = dict(choice["refused"])  # which others come near depends on the layout, and that on invented times
        assert refused.pop("cublas") == "too slow to wait for" and choice["tactic"] != "cublas"
        assert all(why.startswith("not tried: an estimated ") for why in refused.values())
        medians = [r["median_us"] for r in choice["runners_up"]]
        assert medians == sorted(medians)
    seen = {i for n in data["nodes"] for c in n["choices"] for i in c["instructions"]}
    assert {"wgmma", "fma"} <= seen <= {"wgmma", "fma", "library", "torch"}
    text = inspected(engine, capsys, "--nodes")
    assert "cublas refused: too slow to wait for" in text and "[wgmma" in text


def test_the_memory_plan_is_the_engines(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, manifest = json.loads(inspected(engine, capsys, "--json"))["memory"], store.load(engine)
    assert max(memory["arena_by_bucket"].values()) == memory["arena"] == manifest.arena > 0
    assert memory["slots"] == 4 * manifest.profile.slots.size


OWN = {"gemv", "hopper", "hopper_stream", "hopper_tall", "skinny", "tiled"}


@pytest.mark.parametrize(("pin", "left"), [("!cublas", OWN), ("cublas", {"cublas"})])
def test_a_pin_names_the_one_tactic_or_the_one_left_out(engine: Path, pin: str, left: set[str]) -> None:
    program = store.load(engine).programs["decode"]
    site = next(Site.of(n) for n in program.phases["forward"].graph.nodes if n.op == "linear")
    found = {c.tactic_name for t in (1, 16, 256) for c in candidates(site, sizes(t), H200, {"linear": pin})[0]}
    assert found == left


def sizes(tokens: int) -> dict[str, int]:
    return {"T": tokens, "S": 1, "L": 1, "M": 4, "U": 100}


def test_the_roof_is_the_one_that_the_build_measured(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roof = json.loads(inspected(engine, capsys, "--json"))["roof"]
    assert roof["bytes_per_s"] == 4e12 and not roof["assumed"]
    assert roof["timed_tokens"] == 1  # so that it may be compared with a roof of one token
    assert roof["share"] == pytest.approx(roof["seconds_per_token"] / roof["timed_step_seconds"])
    text = inspected(engine, capsys)
    assert "of the roof" in text and "where the time of a step of one token goes" in text
    assert json.loads(inspected(engine, capsys, "--json", "--bandwidth", "1000"))["roof"]["bytes_per_s"] == 1e12
