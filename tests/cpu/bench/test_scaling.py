"""Scaling and kernels of a tiny engine: what is measured, what is refused, shares by hand, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.bench import plot, roofs, scaling
from penstock.bench.figures import Figures
from penstock.bench.kernels import program_sites, roof_of, sizes_at, tactics, to_json
from penstock.bench.latency import Samples
from penstock.bench.report import report
from penstock.bench.session import default_contexts, scaling_limits
from penstock.bench.subject import Opened, Subject, find, open_subject
from penstock.engine import store
from penstock.engine.device import CPU
from penstock.engine.profile import Profile
from penstock.errors import EngineError, OptionError
from penstock.kernels.roof import Roof

ROOF = Roof(1e9, 1e10)


@pytest.fixture(scope="module")
def opened(tiny_engine: Path) -> Iterator[Opened]:
    with open_subject(Subject("tiny", str(tiny_engine), "checkpoint"), device="cpu") as model:
        yield model


def test_points_are_measured_where_they_fit_and_refused_with_a_reason(opened: Opened) -> None:
    measured, said = scaling.Scaling(opened, ROOF, held=1_000_000, new=4), list[str]()
    points = list(measured.points([(1, 16), (4, 16), (8, 16), (1, 300)], said.append))
    assert [(p.batch, p.context) for p in points] == [(1, 16), (4, 16)]
    assert measured.refused == {
        (8, 16): "8 requests exceed max_batch_size=4", (1, 300): "304 tokens a request exceed max_seq_len=256",
    }  # fmt: skip
    assert [text.split(" tokens ")[0] for text in said[:2]] == ["measuring batch 1 at 16", "measuring batch 4 at 16"]
    assert len(said) == 4
    for point in points:
        rate, first, memory = point.shares
        assert point.tokens_per_s > 0 and rate == point.tokens_per_s / point.roof_tokens_per_s
        assert first == point.roof_ttft_ms / point.ttft_ms and 0 < memory < 1
        assert len(point.cells()) == len(scaling.HEAD)
        assert next(r.metric for r in point.records(opened.figure)) == f"decode_bs{point.batch}_ctx16"
    blocks = -(-20 // opened.engine.profile.block_size)
    assert points[1].memory_gb == (1_000_000 + 4 * blocks * opened.engine.block_bytes) / 1e9


def test_the_sustained_rate_is_that_of_every_product(opened: Opened) -> None:
    spec = opened.engine.spec["layers"][0]["layer"]
    assert len(roofs._products(opened.engine)) >= 3, spec
    graph = opened.engine.programs["decode"].phases["forward"].graph
    weights = {v.type.shape for n in graph.nodes for v in n.inputs if v.node.op == "weight" and len(v.type.shape) == 2}
    beside = {n.inputs[i].type.shape for n in graph.nodes for i in range(len(n.inputs)) if n.op == "embedding"}
    assert {shape for shape in weights if shape not in beside} >= roofs._products(opened.engine).keys()


def test_no_request_ends_before_the_last_has_decoded(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    run = scaling.Scaling._run
    monkeypatch.setattr(scaling.Scaling, "_run", lambda *given: kept.append(run(*given)) or kept[-1])
    scaling.Scaling(opened, ROOF, held=0, new=4).point(4, 30)  # 24 tokens a step: the prompts take several
    (outputs,) = kept
    last = outputs[-1].metrics
    assert last.first_token == max(o.metrics.first_token for o in outputs)
    assert all(o.metrics.finished >= last.finished for o in outputs) and len(outputs[-1].outputs[0].token_ids) == 4


def test_the_two_edges_or_the_whole_grid() -> None:
    assert scaling.combinations([2, 1], [8, 16], grid=False) == [(1, 8), (2, 8), (1, 16)]
    assert scaling.combinations([2, 1], [8, 16], grid=True) == [(1, 8), (1, 16), (2, 8), (2, 16)]
    with pytest.raises(OptionError, match="contexts=0 must be numbers from 1"):
        scaling.combinations([1], [0], grid=False)


def test_limits_are_built_for_what_is_asked(tmp_path: Path, tiny_engine: Path) -> None:
    long = find("llama3.1-8b-long", cache_dir=tmp_path)
    assert default_contexts(long, 32) == scaling.CONTEXTS
    assert scaling_limits(long, [1, 512], [32768], 32) == {"max_batch_size": 512, "max_seq_len": 32768 + 32 + 512}
    assert default_contexts(find(None), 32) == scaling.SHORT_CONTEXTS
    assert scaling_limits(find(str(tiny_engine)), [1], [32768], 32) == {}


def test_every_tactic_stands_with_its_rates(tiny_engine: Path) -> None:
    rows = tactics(tiny_engine, ROOF)
    timing = json.loads((tiny_engine / store.TIMING).read_text())
    assert {r.site for r in rows} == {key for key, site in timing.items() if site.get("points")}
    row = next(r for r in rows if r.op == "linear" and r.chosen and r.median_us)
    assert row.median_us == timing[row.site]["points"]["any"][row.tactic]["median_us"]
    assert row.bytes_per_s == pytest.approx(row.cost.bytes / row.median_us * 1e6)
    assert row.share == pytest.approx(max(row.cost.bytes / 1e9, row.cost.flops / 1e10) * 1e6 / row.median_us)
    assert json.loads(json.dumps(to_json(rows)))[0]["site"] == rows[0].site
    assert roof_of(store.load(tiny_engine)) is None
    assert roof_of(replace(store.load(tiny_engine), roof={"read_bytes_per_s": 1.0, "flops_per_s": 2.0})) == Roof(
        1.0, 2.0
    )


def test_tactics_are_filtered_and_unknown_names_refused(tiny_engine: Path) -> None:
    assert {r.op for r in tactics(tiny_engine, None, op="sample")} == {"sample"}
    assert {r.at for r in tactics(tiny_engine, None, at="any")} == {"any"}
    with pytest.raises(OptionError, match=r"--op 'magic' was not timed in this engine; it has add"):
        tactics(tiny_engine, None, op="magic")
    with pytest.raises(OptionError, match=r"--bucket 'T3' was not timed"):
        tactics(tiny_engine, None, at="T3")
    with pytest.raises(EngineError):
        tactics(tiny_engine.parent, None)


def test_sites_within_fused_ones_are_found_and_sizes_follow_their_names(tiny_engine: Path) -> None:
    engine = store.load(tiny_engine)
    ops = {site.op for site in program_sites(engine.programs["decode"]).values()}
    assert {"linear_glu", "packed_glu", "linear", "rope", "attention"} <= ops
    profile = Profile(64, 8192, 4096)
    assert (sizes_at(profile, "T512")["T"], sizes_at(profile, "T512")["L"]) == (512, 64)
    assert sizes_at(profile, "L8")["L"] == 8 and sizes_at(profile, "any") == profile.unpadded["any"]


def test_pictures_need_an_extra_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"checkout: pip install -e '\.\[bench\]'"):
        plot.require()


def test_pictures_are_drawn(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = Figures(opened, CPU, ROOF, samples=(Samples(10, (1.0, 3.0)), Samples(20, (5.0, 7.0))))
    told = report(figures, [opened.figure("decode_bs1", 100.0, "tok/s", 0.5)], held=1)
    plot.latency(told, tmp_path / "a" / "latency.png")
    plot.scaling([scaling.Point(1, 16, 1.0, 2.0, 3.0, 1.0, 5.0, 2.0, 1.0)], "title", tmp_path / "scaling.png")
    for name in ("a/latency.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
