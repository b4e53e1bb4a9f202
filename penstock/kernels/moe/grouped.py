"""Experts on the tensor cores: assignments in the order of their experts, tiles of one expert each."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.linear.product import distinct, fitting_columns, shared_limit
from penstock.kernels.moe.mixture import Given, Mixture, missing, number, refusal, use
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, cdiv, next_power_of_2, outputs

SOURCE = "penstock.kernels.moe.grouped_triton:"
COUNTED = 128, 4096  # assignments that a program looks at together, at least and at most
EACH_WARP = 256  # of them
ALL = 1 << 14  # more tiles than there are
COMBINED = 1024  # columns of a row that one program adds up
GATHERED = 4096  # numbers that a program copies

# (TILE, ROWS, COLUMNS, STAGES, warps): places, rows of w, columns of both.
FEW = ((16, 128, 128, 4, 4), (16, 64, 128, 6, 4), (16, 128, 64, 6, 4), (16, 256, 64, 4, 8))
SOME = ((32, 128, 64, 5, 4), (32, 256, 64, 4, 8))
MORE = ((64, 256, 64, 4, 8), (64, 128, 64, 4, 4))
MANY = ((128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (128, 128, 64, 4, 8), (128, 128, 64, 3, 4))
# Up to so many assignments of an expert, on average: more empty places cost less than reading its weights twice.
SHAPES = ((8, FEW + SOME[:1]), (24, SOME + FEW[:2]), (64, MORE + SOME), (1 << 30, MANY + MORE))
F32 = ((16, 64, 32, 3, 4), (64, 64, 32, 3, 4))


@dataclass(frozen=True, slots=True)
class Places:
    """Where the order of assignments is kept, at the start of a workspace."""

    m: Mixture
    tile: int

    @property
    def tiles(self) -> int:
        return self.m.tiles(self.tile)

    @property
    def count(self) -> int:
        return self.tiles * self.tile

    @property
    def _layout(self) -> tuple[tuple[int, ...], int]:
        return gpu.layout(4 * self.m.experts, 4 * self.count, 4 * self.m.assignments, 4 * self.tiles, 4)

    @property
    def bytes(self) -> int:
        return self._layout[1]

    def given(self, *names: str) -> Given:
        where = dict(zip(("counts", "order", "places", "owners", "used"), self._layout[0], strict=True))
        return tuple((name, "*i32", Arg("workspace", where[name])) for name in names)

    def align(self, device: Device) -> tuple[KernelUse, KernelUse]:
        """Counts, then the order."""
        block = min(max(next_power_of_2(self.m.assignments), COUNTED[0]), COUNTED[1])
        config = {"BLOCK": block, "warps": max(4, block // EACH_WARP)}
        grid, experts, end = (self.m.experts, 1), self.m.args(("experts",)), number("assignments", self.m.assignments)
        counted = use(SOURCE + "count", device, (*experts, *self.given("counts"), *end), grid, config)
        given = (*experts, *self.given("counts", "order", "places", "owners", "used"), *end)
        sizes = {"X": self.m.experts, "TILE": self.tile}
        return counted, use(SOURCE + "align", device, given, grid, config, (), **sizes)

    def gather(self, device: Device, to: Given) -> KernelUse:
        columns = min(GATHERED, next_power_of_2(self.m.width))
        config = {"ROWS": GATHERED // columns, "COLUMNS": columns, "warps": 4}
        grid = (cdiv(self.count, config["ROWS"]), cdiv(self.m.width, columns))
        given = (*self.m.args(("x",)), *self.given("order", "used"), *to)
        return use(SOURCE + "gather", device, given, grid, config, E=self.m.width, CHOSEN=self.m.chosen)

    def combine(self, device: Device, each: Given) -> KernelUse:
        columns = min(COMBINED, next_power_of_2(self.m.width))
        y: Given = (("y", gpu.pointer(self.m.x), outputs(0)[0]),)
        given = (*each, *self.m.args(("weights",)), *self.given("places"), *y)
        grid, config = (self.m.tokens, cdiv(self.m.width, columns)), {"COLUMNS": columns, "warps": 4}
        return use(SOURCE + "combine", device, given, grid, config, E=self.m.width, CHOSEN=self.m.chosen)


class Grouped(Tactic):
    """Two products, each tile of which is one expert's; then each token adds its own up."""

    op = "moe"
    name = "grouped"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := refusal(site, sizes, device, 2):
            return why
        m = Mixture.of(site, sizes)
        if m.x.format != m.inputs["w_in"].format or m.x.format != m.inputs["w_out"].format:
            return f"tensor cores want one format for all, not {m.x.format} and {m.inputs['w_in'].format}"
        return None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        m = Mixture.of(site, sizes)
        shapes = next(shapes for most, shapes in SHAPES if m.assignments <= most * m.experts)
        size = m.x.format.bytes
        return distinct(
            {"TILE": t, "ROWS": r, "columns": c, "STAGES": s, "warps": w}
            for t, r, c, s, w in (F32 if size == 4 else shapes)
            if s * (t + r) * c * size <= shared_limit(device)
        )

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        m = Mixture.of(site, sizes)
        places = Places(m, config["TILE"])
        size, pointer = m.x.format.bytes, gpu.pointer(m.x)
        (at_h, at_each), total = gpu.layout(places.count * m.hidden * size, places.count * m.width * size)
        h = Arg("workspace", places.bytes + at_h)
        each = Arg("workspace", places.bytes + at_each)
        tiled = self._product(
            m, places, device, config, (("x", pointer, Arg("in", 0)), ("w", *_w(m, "w_in")), *_bias(m, "b_in")),
            ("y", pointer, h), m.chosen,
        )  # fmt: skip
        left = self._product(
            m, places, device, config, (("x", pointer, h), ("w", *_w(m, "w_out")), *_bias(m, "b_out")),
            ("y", pointer, each), 0,
        )  # fmt: skip
        last = places.combine(device, (("each", pointer, each),))
        return Draft((*places.align(device), tiled, left, last), places.bytes + total)

    def _product(
        self, m: Mixture, places: Places, device: Device, config: Config, operands: Given, y: tuple[str, str, Arg],
        chosen: int,
    ) -> KernelUse:  # fmt: skip
        """The first product where `chosen` says how tokens stand in x, else the second."""
        n, k = (2 * m.hidden, m.width) if chosen else (m.width, m.hidden)
        cut = {**config, "COLUMNS": fitting_columns(config["columns"], k)}
        skinny = config["TILE"] < 64
        given = (*operands, y, *places.given("order", "owners", "used"), *number("tiles", places.tiles))
        return use(
            SOURCE + "multiply", device, given, (places.tiles * cdiv(n, config["ROWS"]), 1), cut,
            missing(m, "b_in") and ("bias",), N=n, K=k, CHOSEN=chosen, GROUP=ALL if skinny else 8,
            ACT=m.act if chosen else "", LIMIT=m.limit, ALPHA=m.alpha,
        )  # fmt: skip


def _w(m: Mixture, name: str) -> tuple[str, Arg]:
    ((_, kind, arg),) = m.args((name,))
    return kind, arg


def _bias(m: Mixture, name: str) -> Given:
    return tuple(("bias", kind, arg) for _, kind, arg in m.args((name,)))
