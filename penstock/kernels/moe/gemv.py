"""Experts of up to a few tokens on the plain cores, token by token: bound by the stream of weights."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.linear.product import distinct, fitting_columns
from penstock.kernels.moe.mixture import Given, Mixture, missing, refusal, use
from penstock.kernels.tactic import Config, Draft, Tactic, cdiv, outputs

SOURCE = "penstock.kernels.moe.gemv_triton:"
MAX_TOKENS = 16
MAX_ASSIGNMENTS = 128  # beyond, tokens share their experts too often for each to read them by itself

# (ROWS, COLUMNS, warps) of the first product and of the second, best first; rows of the first are gate and up in turn.
SHAPES = (
    ((4, 2048, 8), (4, 2048, 8)),
    ((4, 2048, 8), (4, 1024, 4)),
    ((8, 1024, 4), (8, 1024, 4)),
    ((4, 2048, 8), (2, 1024, 4)),
    ((8, 512, 4), (4, 256, 2)),
    ((4, 1024, 4), (2, 256, 1)),
)


class Gemv(Tactic):
    """A product for each token and expert, then one for each token that adds its experts up."""

    op = "moe"
    name = "gemv"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := refusal(site, sizes, device, 1, MAX_TOKENS):
            return why
        count = Mixture.of(site, sizes).assignments
        return f"{count} tokens times experts; made for up to {MAX_ASSIGNMENTS}" if count > MAX_ASSIGNMENTS else None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        m = Mixture.of(site, sizes)
        return distinct(
            {"in_rows": r, "in_columns": fitting_columns(c, m.width), "in_warps": w}
            | {"out_rows": rows, "out_columns": fitting_columns(columns, m.hidden), "out_warps": warps}
            for (r, c, w), (rows, columns, warps) in SHAPES
        )

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        m = Mixture.of(site, sizes)
        h: Given = (("h", gpu.pointer(m.x), gpu.workspace(0)[0]),)
        y: Given = (("y", gpu.pointer(m.x), outputs(0)[0]),)
        first, second = (
            {"ROWS": config[f"{side}_rows"], "COLUMNS": config[f"{side}_columns"], "warps": config[f"{side}_warps"]}
            for side in ("in", "out")
        )
        sizes_of = {"E": m.width, "F": m.hidden, "CHOSEN": m.chosen}
        enter = use(
            SOURCE + "enter", device, (*m.args(("x", "experts", "w_in", "b_in")), *h),
            (m.assignments, cdiv(2 * m.hidden, first["ROWS"])), first, missing(m, "b_in"),
            **sizes_of, ACT=m.act, LIMIT=m.limit, ALPHA=m.alpha,
        )  # fmt: skip
        leave = use(
            SOURCE + "leave", device, (*h, *m.args(("experts", "weights", "w_out", "b_out")), *y),
            (m.tokens, cdiv(m.width, second["ROWS"])), second, missing(m, "b_out"), **sizes_of,
        )  # fmt: skip
        return Draft((enter, leave), m.assignments * m.hidden * m.x.format.bytes)
