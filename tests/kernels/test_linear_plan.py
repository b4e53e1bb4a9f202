"""What product tactics say they can do, and what they plan: arithmetic alone."""

from __future__ import annotations

import pytest

from penstock.engine.device import CPU, H200, Device
from penstock.engine.program import Call, Site, Sizes
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Draft, KernelUse, Tactic
from tests.kernels.cases.linear import CASES, linear, linear_glu

L4 = Device("cuda", "NVIDIA L4", 89, 58, 48 << 20, 24 << 30)


def _tactic(op: str, name: str) -> Tactic:
    return next(t for t in tactics(op) if t.name == name)


def _draft(site: Site, sizes: Sizes, name: str, **changes: int) -> Draft:
    tactic = _tactic(site.op, name)
    return tactic.plan(site, sizes, H200, {**tactic.tunables(site, sizes, H200)[0], **changes})


@pytest.mark.parametrize(("tokens", "names"), [
    (1, {"cublas", "gemv"}), (2, {"cublas", "gemv", "hopper_stream", "skinny"}),
    (8, {"cublas", "gemv", "hopper_stream", "skinny"}), (9, {"cublas", "hopper_stream", "skinny"}),
    (33, {"cublas", "hopper_stream", "skinny", "tiled"}), (64, {"cublas", "hopper_stream", "skinny", "tiled"}),
    (65, {"cublas", "hopper_stream", "tiled"}), (128, {"cublas", "hopper_stream", "tiled"}),
    (129, {"cublas", "hopper", "hopper_tall", "tiled"}), (8192, {"cublas", "hopper", "tiled"}),
])  # fmt: skip
def test_each_tactic_has_its_range_of_tokens(tokens: int, names: set[str]) -> None:
    site = linear("bf16", 4096, 4096)
    assert {t.name for t in tactics("linear") if t.supports(site, {"T": tokens}, H200) is None} == names
    gated = linear_glu("bf16", 4096, 4096, "silu")
    able = {t.name for t in tactics("linear_glu") if t.supports(gated, {"T": tokens}, H200) is None}
    assert able == names - {"cublas"}


def test_logit_rows_count_where_the_rows_are_logit_rows() -> None:
    site = linear("bf16", 4096, 4096, tokens="L")
    assert _tactic("linear", "gemv").supports(site, {"L": 1, "T": 500}, H200) is None


@pytest.mark.parametrize(("name", "site", "device", "words"), [
    ("gemv", linear("bf16", 64, 64), CPU, "needs a CUDA device"),
    ("cublas", linear("bf16", 64, 64), CPU, "needs a CUDA device"),
    ("skinny", linear("bf16", 64, 64, w="f16"), H200, "not bf16 and f16"),
    ("tiled", linear("bf16", 64, 64), H200, "8 tokens"),
    ("cublas", linear("bf16", 64, 64, w="f16"), H200, "one format"),
    ("cublas", linear("f32", 64, 64, out="bf16"), H200, "not bf16"),
])  # fmt: skip
def test_a_refusal_says_why(name: str, site: Site, device: Device, words: str) -> None:
    assert words in str(_tactic("linear", name).supports(site, {"T": 8}, device))


@pytest.mark.parametrize("device", [H200, L4], ids=lambda d: d.name)
def test_configurations_are_few_distinct_and_fit(device: Device) -> None:
    for site, sizes in CASES:
        for tactic in tactics(site.op):
            if tactic.supports(site, sizes, device) is None:
                configs = tactic.tunables(site, sizes, device)
                assert 0 < len(configs) <= 8 and len({tuple(c.items()) for c in configs}) == len(configs)
                for config in configs:
                    assert tactic.plan(site, sizes, device, config) == tactic.plan(site, sizes, device, config)


def test_a_split_asks_for_room_and_for_a_counter_of_each_tile() -> None:
    whole = _draft(linear("bf16", 4096, 4096, bias=True), {"T": 8}, "skinny", SPLIT=1)
    split = _draft(linear("bf16", 4096, 4096, bias=True), {"T": 8}, "skinny", SPLIT=4)
    assert (whole.workspace, whole.zeroed) == (0, 0)
    assert (split.workspace, split.zeroed) == (4 * 8 * 4096 * 4, 64 * 4)
    (step,) = split.steps
    assert isinstance(step, KernelUse) and step.grid == (64, 4, 1)


def test_small_matrices_are_split_and_large_ones_are_not() -> None:
    assert _draft(linear("bf16", 1024, 4096), {"T": 16}, "skinny").zeroed
    assert not _draft(linear_glu("bf16", 14336, 4096, "silu"), {"T": 16}, "skinny").zeroed


def test_older_devices_get_kernels_that_do_not_wait_by_themselves() -> None:
    site, sizes = linear("bf16", 512, 512), {"T": 4}
    for device, waits in ((H200, True), (L4, False)):
        for name in ("gemv", "skinny"):
            tactic = _tactic("linear", name)
            for step in tactic.plan(site, sizes, device, tactic.tunables(site, sizes, device)[0]).steps:
                assert isinstance(step, KernelUse) and ("PDL", waits) in step.kernel.constants


def test_the_library_takes_the_whole_site() -> None:
    site = linear("bf16", 64, 64, bias=True, out="f32")
    (call,) = _tactic("linear", "cublas").plan(site, {"T": 4}, H200, {}).steps
    assert isinstance(call, Call) and call.name == "cublas" and len(call.inputs) == 3
