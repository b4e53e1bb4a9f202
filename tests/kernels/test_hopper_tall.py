"""The product with rows of w as the tall operand: compiled for a GPU that is not there, and its arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from penstock.engine.device import H200
from penstock.engine.program import Site
from penstock.kernels.linear.hopper_tall import Cut, HopperTall
from penstock.kernels.linear.product import Product
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Config, CudaKernel, Draft, KernelUse, cdiv
from tests.kernels.cases.linear import linear, linear_glu
from tests.kernels.resources import MAX_SHARED, compiled, count, resources

# What an 8B model asks for, and odd sizes.
QKV, OUT, DOWN = linear("bf16", 6144, 4096), linear("f16", 4096, 4096, bias=True), linear("bf16", 4096, 14336)
GATED = linear_glu("bf16", 14336, 4096, "silu")
SITES = [QKV, OUT, DOWN, GATED, linear("bf16", 131, 264, bias=True, out="f32"), linear_glu("f16", 129, 1032, "gelu")]
TOKENS = (129, 136, 160, 200, 208, 257, 300, 400, 416, 511, 512, 1000)
COMPILED = [
    (QKV, 320),
    (OUT, 416),
    (DOWN, 160),
    (GATED, 160),
    (GATED, 352),
    (GATED, 400),
    (GATED, 416),
    (GATED, 448),
    (SITES[4], 300),
    (SITES[5], 140),
]


def tactic(site: Site) -> HopperTall:
    (found,) = (t for t in tactics(site.op) if isinstance(t, HopperTall))
    return found


def configs(site: Site, tokens: int) -> tuple[Config, ...]:
    return tactic(site).tunables(site, {"T": tokens}, H200)


def draft(site: Site, tokens: int, config: Config) -> tuple[Draft, KernelUse]:
    made = tactic(site).plan(site, {"T": tokens}, H200, config)
    (use,) = made.steps
    assert isinstance(use, KernelUse) and isinstance(use.kernel, CudaKernel)
    return made, use


def every() -> Iterator[tuple[Site, int, Draft, KernelUse, dict[str, Any]]]:
    for site in SITES:
        for tokens in TOKENS:
            for config in configs(site, tokens):
                made, use = draft(site, tokens, config)
                yield site, tokens, made, use, dict(use.kernel.constants)


@pytest.mark.parametrize(("site", "tokens"), COMPILED, ids=lambda x: getattr(x, "key", x))
def test_the_best_configuration_compiles_to_warp_group_products_without_spills(site: Site, tokens: int) -> None:
    _, use = draft(site, tokens, configs(site, tokens)[0])
    binary, used = compiled(use.kernel), resources(compiled(use.kernel))
    assert (used.stack, used.local) == (0, 0)
    assert binary.instruction == "wgmma" and count(binary, "wgmma.mma_async") > 0
    assert 32 * binary.num_warps * used.registers <= 64 << 10
    assert "griddepcontrol.launch_dependents" in binary.ptx
    assert binary.ptx.find("griddepcontrol.wait") < binary.ptx.find("st.global")
    assert ".release.cluster.shared::cluster" not in binary.ptx, "a fence of the whole GPU"


def test_a_split_compiles_with_an_exchange_in_order() -> None:
    _, use = draft(OUT, 320, {"HEIGHT": 2, "SPLIT": 2, "TILE": 160})
    binary = compiled(use.kernel)
    assert resources(binary).stack == 0
    assert "red.release.gpu.global.inc" in binary.ptx and "ld.acquire.gpu" in binary.ptx
    assert ".add.f32 [" not in binary.ptx, "sums in memory come in any order"


def test_a_split_whose_blocks_are_not_all_resident_is_refused() -> None:
    """They wait for one another. A device of few processors has no room for all pairs and parts."""
    small = replace(H200, multiprocessors=20)
    p = Product.of(linear("bf16", 256, 4096), {"T": 1000})
    fits, crowded = Cut(p, H200, 4, 4, 176), Cut(p, small, 4, 4, 176)
    assert fits.is_able() and fits.grid <= H200.multiprocessors
    assert crowded.grid > small.multiprocessors and not crowded.is_able()
    assert Cut(p, small, 4, 1, 176).is_able()


def test_every_configuration_fits_and_is_one_of_few() -> None:
    ways = set()
    for site, tokens, made, use, c in every():
        what = (site.key, tokens, c)
        assert len(configs(site, tokens)) <= 3, what
        assert use.kernel.shared <= MAX_SHARED and c["STAGES"] >= 3, what
        assert use.grid[0] % 2 == 0 and use.grid[0] <= H200.multiprocessors, "blocks of a split wait for one another"
        assert (made.workspace > 0) == (made.zeroed > 0) == (c["SPLIT"] > 1), what
        ways.add((c["SHARE_W"], c["SPLIT"] > 1, c["GATED"] > 0))
    assert ways == {
        (0, False, True),
        (1, False, True),
        (0, True, False),
        (1, True, False),
        (1, False, False),
    }


@pytest.mark.parametrize("site", SITES, ids=lambda s: s.key)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_tiles_cover_every_row_and_every_token_once(site: Site, tokens: int) -> None:
    """The walk of hopper_tall.cu's `Place`, in Python."""
    for config in configs(site, tokens):
        c = dict(draft(site, tokens, config)[1].kernel.constants)
        seen = sorted(tiles(c, tokens))
        columns = c["N"] // 2 if c["GATED"] else c["N"]
        units, unit = cdiv(columns, 32 if c["GATED"] else 64), c["TILE_T"]
        needed = [(t, u, s) for t in range(0, tokens, unit) for u in range(units) for s in range(c["SPLIT"])]
        assert len(set(seen)) == len(seen), config
        assert [x for x in seen if x[0] < tokens] == sorted(needed), config
        assert c["SPLIT"] * steps(c) * 64 >= c["K"], config


def steps(c: dict[str, Any]) -> int:
    return cdiv(cdiv(c["K"], 64), c["SPLIT"])


def tiles(c: dict[str, Any], tokens: int) -> Iterator[tuple[int, int, int]]:
    """(token, unit, split) of all that blocks work on."""
    columns = c["N"] // 2 if c["GATED"] else c["N"]
    units, sides, along = cdiv(columns, 32 if c["GATED"] else 64), 1 if c["SHARE_W"] else 2, c["ALONG"]
    passes = cdiv(cdiv(units, along), sides * c["HEIGHT"])
    across = cdiv(tokens, c["TILE_T"])
    pairs = cdiv(across, 2) if c["SHARE_W"] else across
    for block in range(2 * along * pairs * c["SPLIT"]):
        rank, pair, split = block % 2, block // 2 % pairs, block // 2 // pairs % c["SPLIT"]
        at = block // 2 // pairs // c["SPLIT"]
        begin, end = units * at // along, units * (at + 1) // along
        for i in range(passes):
            piece, pieces = (i if c["SHARE_W"] else 2 * i + rank), passes * sides
            first, last = (begin + (end - begin) * x // pieces for x in (piece, piece + 1))
            assert last - first <= c["HEIGHT"]
            for unit in range(first, last):
                yield (2 * pair + rank if c["SHARE_W"] else pair) * c["TILE_T"], unit, split


@pytest.mark.parametrize("tokens", [160, 224, 320, 352, 416])
def test_few_tokens_of_a_prompt_are_padding(tokens: int) -> None:
    for site in (QKV, DOWN, GATED):
        _, use = draft(site, tokens, configs(site, tokens)[0])
        tile = dict(use.kernel.constants)["TILE_T"]
        assert cdiv(tokens, tile) * tile <= 1.05 * tokens


def test_parts_and_counters_have_room_for_every_block() -> None:
    made, use = draft(OUT, 320, {"HEIGHT": 2, "SPLIT": 2, "TILE": 160})
    cut = Cut(Product.of(OUT, {"T": 320}), H200, 2, 2, 160)
    runs = cut.tile // 8  # of a thread with one unit, four numbers each
    assert made.workspace == use.grid[0] * runs * 256 * 16
    assert made.zeroed == use.grid[0] // 2 * 8 * 4
    assert [a.kind for a in use.args] == ["in", "in", "in", "out", "workspace", "zeroed", "int"]


def test_what_they_share_is_copied_in_halves() -> None:
    _, alone = draft(GATED, 160, {"HEIGHT": 4, "SPLIT": 1, "TILE": 160})
    _, many = draft(GATED, 320, {"HEIGHT": 4, "SPLIT": 1, "TILE": 160})
    boxes = [[a.tile.box for a in use.args if a.tile] for use in (alone, many)]
    assert boxes == [[(80, 64), (32, 64)], [(160, 64), (32, 64)]]


def test_gate_and_up_come_in_turn_from_the_copy_engine_where_whole_eights_do() -> None:
    _, whole = draft(GATED, 320, {"HEIGHT": 4, "SPLIT": 1, "TILE": 160})
    _, odd = draft(SITES[5], 320, {"HEIGHT": 4, "SPLIT": 1, "TILE": 160})
    plain, turns = compiled(odd.kernel), compiled(whole.kernel)
    assert [(a.tile.box[0], a.tile.turns) for u in (whole, odd) for a in u.args[1:2] if a.tile] == [
        (32, True),
        (8, False),
    ]
    assert "bulk.tensor.4d" in turns.ptx and "bulk.tensor.4d" not in plain.ptx
    assert "bar.sync" not in turns.ptx, "a thread has both numbers of a pair"


def test_registers_that_move_are_those_the_block_was_given() -> None:
    """Who waits for registers that never come waits for ever."""
    _, use = draft(GATED, 400, configs(GATED, 400)[0])
    binary = compiled(use.kernel)
    more, fewer = (
        int(re.findall(rf"setmaxnreg.{way}.sync.aligned.u32 (\d+)", binary.ptx)[0]) for way in ("inc", "dec")
    )
    assert 2 * more + fewer <= 3 * resources(binary).registers


@pytest.mark.parametrize(("tokens", "tile"), [(200, 104), (400, 200), (416, 208), (300, 152), (257, 136)])
def test_tiles_that_share_w_are_cut_to_eight_tokens(tokens: int, tile: int) -> None:
    cut = Cut(Product.of(GATED, {"T": tokens}), H200, 3, 1, tile)
    assert cut.tile == tile and dict(cut.use().kernel.constants)["TILE_T_16"] == f"{tile // 16}{'H' * (tile % 16 // 8)}"


def test_a_bucket_is_cut_evenly_by_the_configuration_of_a_larger_one() -> None:
    """Those between the timed sizes run what was fastest at the next."""
    for tokens, timed in ((416, 448), (208, 256), (352, 384), (160, 192)):
        for config in configs(GATED, timed):
            c = dict(draft(GATED, tokens, config)[1].kernel.constants)
            across = cdiv(timed, config["TILE"])
            assert c["TILE_T"] - tokens / across < (16 if across == 1 else 8), config


REFUSED = [
    (QKV, 128, "made for 129 to 1024"), (QKV, 1025, "made for 129 to 1024"),
    (linear("bf16", 64, 2050), 200, "multiple of 8"), (linear("f32", 64, 64), 200, "supported are bf16, f16"),
    (linear("bf16", 64, 64, out="f16"), 200, "neither"), (replace(QKV, weights=()), 200, "made by the step"),
]  # fmt: skip


@pytest.mark.parametrize(("site", "tokens", "why"), REFUSED, ids=[w for *_, w in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_reason(site: Site, tokens: int, why: str) -> None:
    assert why in str(tactic(site).supports(site, {"T": tokens}, H200))


@pytest.mark.parametrize("capability", [80, 100])
def test_other_devices_are_refused(capability: int) -> None:
    reason = tactic(GATED).supports(GATED, {"T": 200}, replace(H200, capability=capability))
    assert reason is not None and "9.0 alone" in reason


@pytest.mark.parametrize("tokens", [192, 256, 416, 512, 1024])
def test_what_was_chosen_for_a_bucket_runs_in_those_below_it(tokens: int) -> None:
    router = linear("bf16", 8, 4096, out="f32")
    for site in (QKV, OUT, DOWN, router):
        p = Product.of(site, {"T": tokens})
        for config in configs(site, tokens):
            for fewer in range(max(HopperTall.LOW, tokens // 2), tokens):
                _, use = draft(site, fewer, config)
                assert isinstance(use.kernel, CudaKernel)
                split = int(dict(use.kernel.constants)["SPLIT"])
                cut = Cut(replace(p, tokens=fewer), H200, config["HEIGHT"], split, config["TILE"])
                assert cut.is_able(), f"{fewer} tokens by {config}"
