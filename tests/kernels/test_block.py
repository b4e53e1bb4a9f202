"""The launch from one attention to the next: how it is cut, what it refuses, and its kernel for a GPU not there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest

from penstock.engine.device import H200
from penstock.engine.program import KernelLaunch, Site, plan_from_json, plan_to_json
from penstock.errors import BuildError
from penstock.ir.graph import tensor
from penstock.kernels import driver
from penstock.kernels.compile import compile_kernel
from penstock.kernels.dense_block.stream import BlockStream
from penstock.kernels.linear.block import EVENT_BYTES, Block, Cut, best_cut
from penstock.kernels.tactic import CudaKernel, KernelUse, cdiv, frozen_plan
from tests.kernels.cases.block import CASES, dense_block
from tests.kernels.resources import MAX_SHARED, compiled, resources

# Q, E, F, N of Llama 3.1 8B and 70B, Llama 2 7B, Qwen2 7B and 0.5B, and of odd ones.
SHAPES = [
    (4096, 4096, 14336, 6144),
    (8192, 8192, 28672, 10240),
    (4096, 4096, 11008, 12288),
    (3584, 3584, 18944, 4608),
    (896, 896, 4864, 1152),
    (256, 192, 344, 328),
    (1064, 1064, 5280, 1544),
]
TOKENS = (2, 8, 16, 33, 64, 65, 128)
TACTIC = BlockStream()


def cuts() -> Iterator[tuple[Block, Cut]]:
    for shape in SHAPES:
        for tokens in TOKENS:
            block = Block(tokens, *shape)
            cut = best_cut(block, H200)
            assert isinstance(cut, Cut), (block, cut)
            yield block, cut


def use_of(site: Site, tokens: int) -> KernelUse:
    (use,) = TACTIC.plan(site, {"T": tokens}, H200, {}).steps
    assert isinstance(use, KernelUse)
    return use


def kernel_of(site: Site, tokens: int) -> CudaKernel:
    kernel = use_of(site, tokens).kernel
    assert isinstance(kernel, CudaKernel)
    return kernel


def test_every_row_has_a_tile_and_every_block_a_multiprocessor() -> None:
    for b, cut in cuts():
        sums, gated, again, last = cut.rows
        assert sums == again and max(cdiv(b.e, sums), cdiv(b.n, last)) <= cut.clusters
        assert cdiv(2 * b.f, gated) <= cut.workers * cut.rounds and cut.workers <= H200.multiprocessors
        assert all(rows % 16 == 0 for rows in cut.rows)


def test_rings_fit_and_hold_what_is_under_way() -> None:
    for b, cut in cuts():
        assert cut.shared(H200) <= MAX_SHARED and cut.window < cut.w_slots(H200), b
        sizes = [rows * 128 * chunks for rows, chunks in zip(cut.rows, cut.chunks, strict=True)]
        assert max(sizes) <= cut.slot
        for i in (0, 2, 3):
            assert cdiv(cut.columns[i], 64 * cut.chunks[i]) >= 2, "both blocks of a cluster have a slot"


def test_an_8b_model_is_dealt_out_without_a_remainder() -> None:
    cut = best_cut(Block(64, *SHAPES[0]), H200)
    assert isinstance(cut, Cut)
    assert (cut.clusters, cut.rounds, cut.rows, cut.chunks) == (64, 2, (64, 112, 64, 96), (2, 1, 2, 1))
    q, e, f, n = SHAPES[0]
    assert cut.read * cut.workers == e * q + 2 * f * e + e * f + n * e


def test_fewer_multiprocessors_get_larger_tiles_or_a_refusal() -> None:
    block = Block(8, *SHAPES[4])
    cut = best_cut(block, replace(H200, multiprocessors=20))
    assert isinstance(cut, Cut) and cut.workers <= 20 and max(cut.rows) > 96
    assert "20 multiprocessors would need tiles too large" in str(
        best_cut(Block(8, *SHAPES[1]), replace(H200, multiprocessors=20))
    )


def mixed(site: Site, index: int, format: str) -> Site:
    types = list(site.inputs)
    types[index] = tensor(format, *types[index].shape)
    return replace(site, inputs=tuple(types))


WIDE = dense_block(*SHAPES[0])
REFUSED = [
    (WIDE, 1, "1 tokens"),
    (WIDE, 129, "129 tokens"),
    (dense_block(256, 192, 344, 324), 8, "324 columns; the kernel stores 8"),
    (dense_block(64, 192, 344, 328), 8, "K is 64"),
    (dense_block(*SHAPES[0], format="f16"), 8, "float16 may overflow"),
    (mixed(WIDE, 6, "f32"), 8, "gain is f32"),
    (replace(WIDE, weights=(1, 3, 5, 6, 7)), 8, "made by the step"),
]


@pytest.mark.parametrize(("site", "tokens", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_reason(site: Site, tokens: int, why: str) -> None:
    assert why in str(TACTIC.supports(site, {"T": tokens}, H200))


def test_other_devices_are_refused() -> None:
    assert "9.0 alone" in str(TACTIC.supports(WIDE, {"T": 8}, replace(H200, capability=100)))


@pytest.mark.parametrize("tokens", [8, 64, 128])
def test_it_compiles_to_warp_group_products_without_spills(tokens: int) -> None:
    for shape in SHAPES[:3] if tokens == 64 else SHAPES[:1]:
        kernel = kernel_of(dense_block(*shape, bias=True), tokens)
        binary, used = compiled(kernel), resources(compiled(kernel))
        assert (used.stack, used.local) == (0, 0) and binary.instruction == "wgmma"
        assert 32 * kernel.num_warps * used.registers <= 64 << 10


def test_what_waits_and_announces_is_there() -> None:
    """Only x and the consumers wait for the launch before, never the weights; whether they wait enough, a GPU shows."""
    ptx = compiled(kernel_of(WIDE, 64)).ptx
    body = ptx[ptx.index(".entry") :]
    assert "griddepcontrol.launch_dependents" in body
    announced = [m.start() for m in re.finditer(r"red\.release\.gpu", body)]
    fences = [m.start() for m in re.finditer(r"fence\.proxy\.async;", body)]
    assert announced and all(any(f < a for f in fences) for a in announced)
    assert "ld.acquire.gpu" in body and ".release.cluster.shared::cluster" not in body
    assert body.count("griddepcontrol.wait") == 2
    assert re.search(r"atom\.\S*add", body), "the last block to leave clears the counters"
    stores = [m.start() for m in re.finditer(r"st\.global", body)]
    assert body.index("griddepcontrol.wait") < min(stores)


def test_constants_that_do_not_fit_each_other_do_not_compile() -> None:
    kernel = kernel_of(WIDE, 64)
    constants = dict(kernel.constants)
    for name, value, why in (("WORKERS", 126, "a tile a cluster"), ("WINDOW", 10, "a slot's parity")):
        with pytest.raises(BuildError, match=why):
            compile_kernel(replace(kernel, constants=tuple((constants | {name: value}).items())), 90)


def test_the_launch_is_cooperative_through_the_manifest_to_the_driver() -> None:
    draft = TACTIC.plan(WIDE, {"T": 64}, H200, {})
    plan = frozen_plan("x", draft, 90)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    (launch,) = plan.launches
    assert isinstance(launch, KernelLaunch) and launch.cooperative and launch.dependent
    assert (launch.grid, plan.zeroed) == ((128, 1, 1), 5 * EVENT_BYTES)
    pytest.importorskip("cuda.bindings")
    names = [a.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_") for a in driver._attributes(launch)]
    assert names == ["PROGRAMMATIC_STREAM_SERIALIZATION", "COOPERATIVE"]
    assert driver._attributes(replace(launch, dependent=False, cooperative=False)) == []


def test_workspace_regions_do_not_overlap() -> None:
    for site, sizes in CASES:
        draft = TACTIC.plan(site, sizes, H200, {})
        (use,) = draft.steps
        assert isinstance(use, KernelUse)
        starts = sorted({a.value for a in use.args if a.kind == "workspace"})
        stream, wide = (sizes["T"] * 2 * int(site.inputs[i].shape[j]) for i, j in ((2, 1), (5, 1)))
        gaps = [b - a for a, b in pairwise((*starts, draft.workspace))]
        rows = int(dict(use.kernel.constants)["ROWS_SUM"])
        shares = sizes["T"] * 2 * -(-int(site.inputs[2].shape[1]) // rows) * 4
        needs = (stream, shares, wide, stream, shares)
        assert len(starts) == 5 and all(gap >= need for gap, need in zip(gaps, needs, strict=True))


def test_the_gpu_cases_reach_both_warp_groups_biases_and_several_rounds() -> None:
    seen = [dict(kernel_of(site, sizes["T"]).constants) for site, sizes in CASES]
    assert {c["WARP_GROUPS"] for c in seen} == {1, 2} and {c["BIAS_BYTES"] for c in seen} == {0, 2}
    tiles = [cdiv(2 * int(c["F"]), int(c["ROWS_GATED"])) for c in seen]
    assert any(t > int(c["WORKERS"]) for t, c in zip(tiles, seen, strict=True))
    assert any(int(c["E"]) % int(c["ROWS_SUM"]) for c in seen)
