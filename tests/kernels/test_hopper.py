"""The products written in CUDA C++, and the door for such kernels: compiled for a GPU that is not there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.engine.device import H200
from penstock.engine.program import Arg, KernelLaunch, Plan, Site, Sizes, Tile, plan_from_json, plan_to_json
from penstock.errors import BuildError
from penstock.ir.graph import tensor
from penstock.kernels import compile_cuda, tactic
from penstock.kernels.compile import compile_kernel, store, stored
from penstock.kernels.linear.hopper import HopperProduct
from penstock.kernels.linear_norm_linear.chain import HopperChain
from penstock.kernels.reference import plan_parts
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Config, CudaKernel, Draft, KernelUse, frozen_plan, kernel_from_json
from tests.kernels.cases.linear import CASES, linear, linear_glu, linear_norm_linear
from tests.kernels.resources import MAX_SHARED, compiled, resources

# What an 8B model asks for, and odd sizes.
SITES = [
    linear("bf16", 6144, 4096),
    linear("bf16", 4096, 14336),
    linear("f16", 4096, 4096, bias=True),
    linear("bf16", 128256, 4096, out="f32"),
    linear("bf16", 131, 264, bias=True, out="f32"),
    linear_glu("bf16", 14336, 4096, "silu"),
    linear_glu("f16", 129, 1032, "gelu"),
]
TOKENS = (8, 64, 100, 8192)
MULTIPROCESSOR_SHARED, MULTIPROCESSOR_REGISTERS = 228 << 10, 64 << 10
SYSTEM_SHARED = 1 << 10  # that each block costs beside its own


def hopper_tactics(op: str) -> list[HopperProduct]:
    return [t for t in tactics(op) if isinstance(t, HopperProduct)]


def drafts(
    cases: list[tuple[Site, Sizes]] | None = None,
) -> Iterator[tuple[HopperProduct, Site, Sizes, Config, KernelUse]]:
    """Every configuration of every tactic for the cases, the kernel's use beside it."""
    for site, sizes in cases or [(s, {"T": t}) for s in SITES for t in TOKENS]:
        for found in hopper_tactics(site.op):
            if found.supports(site, sizes, H200) is None:
                for config in found.tunables(site, sizes, H200):
                    (use,) = found.plan(site, sizes, H200, config).steps
                    assert isinstance(use, KernelUse)
                    yield found, site, sizes, config, use


def cuda(use: KernelUse) -> CudaKernel:
    assert isinstance(use.kernel, CudaKernel)
    return use.kernel


def constants(use: KernelUse) -> dict[str, Any]:
    return dict(cuda(use).constants)


def test_the_best_configurations_compile_to_warp_group_products_without_spills() -> None:
    seen: set[CudaKernel] = set()
    for found, site, sizes, config, use in drafts():
        if config == found.tunables(site, sizes, H200)[0] and cuda(use) not in seen:
            seen.add(cuda(use))
            binary, used = compiled(use.kernel), resources(compiled(use.kernel))
            what = f"{site.key} {sizes} {found.name} {config}"
            assert (used.stack, used.local) == (0, 0), what
            assert binary.instruction == "wgmma" and binary.null_pointers == 0, what
            blocks = constants(use)["BLOCKS"]
            assert blocks * (use.kernel.shared + SYSTEM_SHARED) <= MULTIPROCESSOR_SHARED, what
            assert blocks * 32 * binary.num_warps * used.registers <= MULTIPROCESSOR_REGISTERS, what
    assert len(seen) > 15


def test_every_configuration_fits_and_is_one_of_few() -> None:
    small = [(linear_glu("bf16", f, 2048, "silu"), {"T": t}) for f in (128, 512, 2048) for t in TOKENS]
    for found, site, sizes, config, use in drafts([(s, {"T": t}) for s in SITES for t in TOKENS] + small):
        assert len(found.tunables(site, sizes, H200)) <= 3
        c = constants(use)
        assert cuda(use).shared <= MAX_SHARED and c["STAGES"] >= 2, (site.key, sizes, config)
        assert use.grid[0] % (c["SHARE"] * c["SPLIT"]) == 0
        assert c["ROWS"] // 8 // (2 if c["GATED"] else 1) >= c["SPLIT"], "a block of a split has nothing to add up"
        if c["PERSISTENT"]:
            assert use.grid[0] <= H200.multiprocessors


@pytest.mark.parametrize(("site", "tokens"), [(SITES[0], 64), (SITES[5], 8), (SITES[5], 512)])
def test_of_all_memory_only_weights_are_fetched_before_the_wait(site: Site, tokens: int) -> None:
    use = next(use for *_, use in drafts([(site, {"T": tokens})]))
    ptx = compiled(use.kernel).ptx
    copies = [(m.start(), _origin(ptx, m[1])) for m in re.finditer(r"cp\.async\.bulk\.tensor.*\[(%rd\d+), \{", ptx)]
    first_x = min(at for at, origin in copies if origin.endswith("param_0"))
    ahead = [at for at, origin in copies if origin.endswith("param_1") and at < first_x]
    assert ahead, "no weights are fetched ahead"
    assert "griddepcontrol.wait" in ptx[ahead[-1] : first_x]
    consumers = ptx.rfind("griddepcontrol.wait", 0, ptx.find("wgmma.mma_async"))
    assert consumers > 0 and consumers < ptx.find("st.global"), "consumers wait by themselves"
    assert "griddepcontrol.launch_dependents" in ptx


def _origin(ptx: str, register: str) -> str:
    """The parameter that a register is a copy of."""
    while register.startswith("%"):
        found = re.search(rf"(?:mov|cvta)\S*\s+{register}, (\S+);", ptx)
        assert found, f"where {register} comes from is not seen"
        register = found[1]
    return register


def test_a_stage_is_handed_over_without_a_fence_of_the_whole_gpu() -> None:
    """A release at the scope of the cluster is one, and it costs a third of the speed."""
    uses = [use for _, _, _, _, use in drafts([(SITES[1], {"T": 8192})])]
    assert all(constants(use)["SHARE"] == 2 for use in uses)
    assert "mbarrier.arrive" in compiled(uses[0].kernel).ptx
    assert ".release.cluster.shared::cluster" not in compiled(uses[0].kernel).ptx


REFUSED = [
    (linear("bf16", 64, 64), 1, "1 tokens"),
    (linear("bf16", 64, 2050), 8, "multiple of 8"),
    (linear("f32", 64, 64), 8, "supported are bf16, f16"),
    (linear("bf16", 64, 64, w="f16"), 8, "one format"),
    (linear("bf16", 64, 64, out="f16"), 8, "neither"),
    (replace(linear("bf16", 64, 64), weights=()), 8, "made by the step"),
]


@pytest.mark.parametrize(("site", "tokens", "why"), REFUSED, ids=[w for _, _, w in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_reason(site: Site, tokens: int, why: str) -> None:
    for found in hopper_tactics("linear"):
        reason = found.supports(site, {"T": tokens}, H200)
        assert reason is not None and (why in reason or "tokens; made for" in reason)
    assert any(why in str(t.supports(site, {"T": tokens}, H200)) for t in hopper_tactics("linear"))


@pytest.mark.parametrize(("index", "name"), [(2, "residual"), (3, "gain")])
def test_a_chain_reads_what_goes_beside_as_it_reads_w(index: int, name: str) -> None:
    site, able = linear_norm_linear("bf16", 264, 520, 72), 0
    mixed = list(site.inputs)
    mixed[index] = tensor("f32", *mixed[index].shape)
    for found in (t for t in tactics("linear_norm_linear") if isinstance(t, HopperChain)):
        for tokens in (64, 300):
            if found.supports(site, {"T": tokens}, H200) is None:
                able += 1
                reason = found.supports(replace(site, inputs=tuple(mixed)), {"T": tokens}, H200)
                assert reason is not None and f"{name} is f32" in reason
    assert able


def test_blocks_that_walk_over_tiles_do_not_split_them() -> None:
    """A split's exchange sets its barrier up for one tile."""
    use = next(u for _, _, _, _, u in drafts([(SITES[2], {"T": 64})]) if constants(u)["SPLIT"] > 1)
    kernel = replace(cuda(use), constants=tuple((constants(use) | {"PERSISTENT": 1}).items()))
    with pytest.raises(BuildError, match="exchange of a split is for one tile"):
        compile_kernel(kernel, 90)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_other_devices_are_refused(capability: int) -> None:
    for found in hopper_tactics("linear_glu"):
        reason = found.supports(SITES[5], {"T": 64}, replace(H200, capability=capability))
        assert reason is not None and "9.0 alone" in reason


def test_the_shared_cases_reach_split_and_shared_tiles() -> None:
    """The GPU tests run these cases: each way of using a cluster must be among them."""
    own = [c for c in CASES if c[0].op in ("linear", "linear_glu")]
    ways = {(c["SPLIT"], c["SHARE"], c["GATED"] != 0) for *_, use in drafts(own) for c in [constants(use)]}
    assert {(1, 2, False), (1, 2, True), (2, 1, False), (2, 1, True), (4, 1, False)} <= ways, ways


def test_tensor_maps_survive_the_manifest() -> None:
    found, *_, use = next(drafts())
    plan = frozen_plan(found.name, Draft((use,)), 90)
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan
    (launch,) = plan.launches
    assert isinstance(launch, KernelLaunch)
    assert launch.args[1].tile == Tile("bf16", (6144, 4096), (constants(use)["ROWS"] // 2, 64))


def test_an_argument_without_a_tile_is_written_as_before() -> None:
    plan = Plan("t", (KernelLaunch("k", (1, 1, 1), (Arg("in", 2), Arg("int", 7))),))
    assert plan_to_json(plan)["launches"][0]["args"] == [["in", 2], ["int", 7]]


def test_parts_move_a_tensor_map_to_where_the_value_lives() -> None:
    site, sizes = SITES[5], {"T": 300}

    def choose(part: Site) -> Draft:
        if part.op != "linear":
            return Draft(())
        found = next(t for t in hopper_tactics("linear") if t.supports(part, sizes, H200) is None)
        return found.plan(part, sizes, H200, found.tunables(part, sizes, H200)[0])

    (use,) = plan_parts(site, sizes, choose).steps
    assert isinstance(use, KernelUse)
    assert [a.kind for a in use.args] == ["in", "in", "workspace", "int"]
    assert use.args[0].tile is not None and use.args[0].tile.shape == (300, 4096) and use.args[2].tile is None


SOURCE = """
#include "twice.cuh"
extern "C" __global__ void go(float* x, int n) {
  if (threadIdx.x < n) x[threadIdx.x] *= FACTOR;
}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaKernel]:
    """A kernel of a user's own package."""
    folder = tmp_path / "cuda_plugin"
    folder.mkdir()
    for name, text in (("__init__.py", ""), ("own.py", ""), ("own.cu", SOURCE), ("twice.cuh", "")):
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    tactic.source_hash.cache_clear()
    tactic._kernel_key.cache_clear()
    yield CudaKernel("cuda_plugin.own:go", (("x", "*fp32"), ("n", "i32")), (("FACTOR", 2),), 1)
    for name in [n for n in sys.modules if n.startswith("cuda_plugin")]:
        del sys.modules[name]


def test_a_kernel_of_a_plugin_compiles_and_is_stored_with_what_a_launch_needs(
    plugin: CudaKernel, tmp_path: Path
) -> None:
    again = kernel_from_json(json.loads(json.dumps(asdict(plugin))))
    assert again == plugin
    store(compile_kernel(again, 90), tmp_path / "kernels", plugin.key(90))
    binary = stored(tmp_path / "kernels", plugin.key(90))
    assert binary is not None and binary.cubin[:4] == b"\x7fELF"
    assert (binary.entry, binary.num_warps, binary.shared, binary.null_pointers) == ("go", 1, 0, 0)


@pytest.mark.parametrize("file", ["own.cu", "twice.cuh"])
def test_the_key_follows_the_source_and_its_headers(plugin: CudaKernel, file: str) -> None:
    before, path = plugin.key(90), plugin.files[0].with_name(file)
    path.write_text(path.read_text() + "// another\n")
    tactic.source_hash.cache_clear()
    tactic._kernel_key.cache_clear()
    assert plugin.key(90) != before
    assert replace(plugin, constants=(("FACTOR", 3),)).key(90) != plugin.key(90)


def test_a_mistake_in_the_source_is_an_error_with_the_compilers_words(plugin: CudaKernel) -> None:
    plugin.files[0].write_text('extern "C" __global__ void go() { nonsense }')
    with pytest.raises(BuildError, match=r"cuda_plugin\.own:go does not compile for sm_90.*nonsense"):
        compile_kernel(plugin, 90)


def test_a_missing_compiler_is_an_error_with_the_remedy(plugin: CudaKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    compile_cuda._nvrtc.cache_clear()
    with pytest.raises(BuildError, match=r"needs NVRTC.*penstock\[gpu\]"):
        compile_kernel(plugin, 90)
    compile_cuda._nvrtc.cache_clear()
