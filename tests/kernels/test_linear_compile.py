"""Products and gates, compiled for GPUs that are not there: no spills, tensor cores where they belong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from penstock.engine.device import H200
from penstock.engine.program import Site, Sizes
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Config, KernelUse, Tactic, TritonKernel
from tests.kernels.cases.linear import CASES, glu, linear, linear_activate, linear_glu, linear_norm_linear, packed_glu
from tests.kernels.resources import compile_problems, compiled, count, kernels, resources

# What an 8B model asks for.
REAL: list[tuple[Site, Sizes]] = [
    (linear("bf16", 6144, 4096), {"T": 1}),
    (linear("bf16", 4096, 14336), {"T": 1}),
    (linear("bf16", 4096, 4096), {"T": 8}),
    (linear("f16", 4096, 4096, bias=True), {"T": 2}),
    (linear("bf16", 128256, 4096, out="f32", tokens="L"), {"L": 32, "T": 40}),
    (linear("bf16", 6144, 4096), {"T": 64}),
    (linear("bf16", 6144, 4096), {"T": 512}),
    (linear("bf16", 6144, 4096), {"T": 8192}),
    (linear_glu("bf16", 14336, 4096, "silu"), {"T": 1}),
    (linear_glu("bf16", 14336, 4096, "silu"), {"T": 8}),
    (linear_glu("f16", 14336, 4096, "gelu_tanh"), {"T": 64}),
    (linear_glu("bf16", 14336, 4096, "silu"), {"T": 4096}),
    (linear_norm_linear("bf16", 4096, 4096, 14336, act="silu"), {"T": 1}),
    (linear_norm_linear("bf16", 4096, 14336, 6144), {"T": 8}),
    (linear_norm_linear("bf16", 4096, 4096, 14336, act="silu"), {"T": 64}),
    *((linear_activate("bf16", 16384, 4096, "gelu"), {"T": tokens}) for tokens in (1, 8, 64, 512, 4096)),
    (linear_activate("f16", 11008, 4096, "gelu_tanh", bias=False), {"T": 300}),
    (glu("bf16", 14336, "silu"), {"T": 8}),
    (packed_glu("bf16", 14336, "silu"), {"T": 4096}),
]
DECODE_SHARED = 100 << 10  # more keeps the next kernel of a decode step from starting early


def _tactic(op: str, name: str) -> Tactic:
    return next(t for t in tactics(op) if t.name == name)


def _first_kernel(tactic: Tactic, site: Site, sizes: Sizes, config: Config) -> TritonKernel:
    step = tactic.plan(site, sizes, H200, config).steps[0]
    assert isinstance(step, KernelUse)
    return step.kernel


def test_real_sizes_compile_without_spills() -> None:
    assert compile_problems(REAL) == []


def test_float32_and_odd_sizes_compile_without_spills() -> None:
    odd = [c for c in CASES if c[0].inputs[0].format.name == "f32" or c[0].inputs[0].shape[-1] in (77, 1001)]
    assert compile_problems(odd, older=(80,)) == []


@pytest.mark.parametrize("op", ["linear", "linear_glu"])
def test_tensor_core_tactics_use_wgmma_on_hopper(op: str) -> None:
    found = [(what, kernel) for what, kernel in kernels([c for c in REAL if c[0].op == op]) if _is_dot(kernel)]
    assert {kernel.source.split(":")[1] for _, kernel in found} == {"skinny", "tiled"}
    for what, kernel in found:
        assert count(compiled(kernel), "wgmma.mma_async"), what


def _is_dot(kernel: TritonKernel) -> bool:
    return kernel.source.endswith((":skinny", ":tiled"))


@pytest.mark.parametrize("tokens", [2, 8, 16, 32, 64])
def test_decode_products_leave_shared_memory_for_the_next_kernel(tokens: int) -> None:
    site, sizes = linear("bf16", 4096, 4096), {"T": tokens}
    tactic = _tactic("linear", "skinny")
    kernel = _first_kernel(tactic, site, sizes, tactic.tunables(site, sizes, H200)[0])
    assert resources(compiled(kernel)).shared <= DECODE_SHARED


def _gemv_configs() -> Iterator[tuple[int, Config]]:
    for tokens in (1, 8):
        site = linear("bf16", 4096, 14336)
        yield from ((tokens, c) for c in _tactic("linear", "gemv").tunables(site, {"T": tokens}, H200))


@pytest.mark.parametrize(("tokens", "config"), list(_gemv_configs()), ids=str)
def test_gemv_reads_weights_sixteen_bytes_at_a_time_and_never_spills(tokens: int, config: Config) -> None:
    kernel = _first_kernel(_tactic("linear", "gemv"), linear("bf16", 4096, 14336), {"T": tokens}, config)
    binary = compiled(kernel)
    used = resources(binary)
    assert (used.stack, used.local) == (0, 0)
    per_thread = config["ROWS"] * config["COLUMNS"] // (config["warps"] * 32)
    loads = [line for line in binary.ptx.splitlines() if "ld.global" in line and "evict_first" in line]
    assert len(loads) >= per_thread // 8 and all(".v4.b32" in line for line in loads)


def test_every_kernel_waits_before_it_touches_memory() -> None:
    for what, kernel in kernels(REAL):
        if not isinstance(kernel, TritonKernel):
            continue  # written to fetch weights before: test_hopper.py
        ptx = compiled(kernel).ptx
        wait, touched = ptx.find("griddepcontrol.wait"), ptx.find(".global", ptx.find(".entry"))
        lines = [x for x in ptx[:wait].splitlines() if "ld.global" in x or "st.global" in x or "cp.async" in x]
        assert wait > 0 and touched > 0 and not lines, what
