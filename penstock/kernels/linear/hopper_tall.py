"""Products by `hopper_tall.cu`: rows of w are the tall operand, and tokens are cut up evenly, so few are padding.

For the hundreds of tokens of a short prompt, of which `hopper` would work on the next multiple of 256.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes, Tile
from penstock.kernels.linear.hopper import (
    ACTIVATIONS,
    BARRIER_BYTES,
    DEPTH,
    LINE,
    hopper_refusal,
    streams,
)
from penstock.kernels.linear.product import Product, operands, shared_limit
from penstock.kernels.tactic import Config, CudaKernel, Draft, KernelUse, Tactic, cdiv

SOURCE = "penstock.kernels.linear.hopper_tall:hopper_tall"
UNIT_ROWS = 64  # of w, that a warp group multiplies at once
BOX_ROWS, ODD_BOX_ROWS = 32, 8  # of w, that are copied at once
CLUSTER = 2
WARPS, CONSUMERS = 12, 256  # a warp group that produces, and the threads of two that multiply
RUN_TOKENS = 8
MOST_TOKENS = {1: 256, 2: 208}  # tokens of a tile, by the units of a warp group: more do not fit the registers
MAX_STAGES, FEWEST_STAGES, EASY_STAGES = 8, 3, 4

# What things cost in cycles of a multiprocessor, by timing on an H200.
COLUMN_CYCLES = 2.0  # a token of a unit, in a step
READ_BYTES = 128  # a cycle, of shared memory
FILL_BYTES = 50  # a cycle, from the L2
SHORT_RING = 1.1  # with fewer than EASY_STAGES
PASS_CYCLES, GATED_PASS_CYCLES, START_CYCLES = 2000, 3000, 3000
LEFT_BYTES = 6  # a cycle, through the L2 to the other blocks of a split


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut up on a device; the constants of hopper_tall.cu, whose terms these are."""

    p: Product
    device: Device
    height: int
    split: int
    widest: int  # tokens that a tile may have

    @property
    def tiles(self) -> int:
        """Of tokens: one, or an even number, since two share what they read of w."""
        tiles = cdiv(self.p.tokens, self.widest)
        return 1 if tiles == 1 else CLUSTER * cdiv(tiles, CLUSTER)

    @property
    def tile(self) -> int:
        """Tokens of a tile, in whole patterns of the swizzle; where two blocks fetch halves of it, in two."""
        pattern = RUN_TOKENS * (1 if self.shares_w else CLUSTER)
        return pattern * cdiv(cdiv(self.p.tokens, self.tiles), pattern)

    @property
    def shares_w(self) -> bool:
        return self.tiles > 1

    @property
    def sides(self) -> int:
        """Blocks of a cluster that have rows of their own."""
        return 1 if self.shares_w else CLUSTER

    @property
    def pairs(self) -> int:
        """Clusters beside one another, along the tokens, as the kernel counts them."""
        return cdiv(cdiv(self.p.tokens, self.tile), CLUSTER) if self.shares_w else 1

    @property
    def units(self) -> int:
        columns = self.p.n // 2 if self.p.gated else self.p.n
        return cdiv(columns, UNIT_ROWS // 2 if self.p.gated else UNIT_ROWS)

    @property
    def along(self) -> int:
        """Clusters that the units are dealt to."""
        places = max(1, self.device.multiprocessors // CLUSTER // (self.pairs * self.split))
        return min(places, cdiv(self.units, self.sides))

    @property
    def most(self) -> int:
        """Units of the busiest block."""
        return cdiv(cdiv(self.units, self.along), self.sides)

    @property
    def passes(self) -> int:
        return cdiv(cdiv(self.units, self.along), self.sides * self.height)

    @property
    def steps(self) -> int:
        return cdiv(cdiv(self.p.k, DEPTH), self.split)

    @property
    def stage(self) -> int:
        """Bytes of a stage and its barriers."""
        return (self.height * UNIT_ROWS + self.tile) * LINE + BARRIER_BYTES

    @property
    def stages(self) -> int:
        return min(MAX_STAGES, shared_limit(self.device) // self.stage)

    @property
    def shared(self) -> int:
        return self.stages * self.stage

    @property
    def grid(self) -> int:
        return self.along * self.pairs * self.split * CLUSTER

    @property
    def workspace(self) -> int:
        """Bytes for the parts of a split: 16 for each run of each thread."""
        runs = cdiv(self.height, 2) * self.tile // RUN_TOKENS
        return self.grid * runs * CONSUMERS * 16 if self.split > 1 else 0

    @property
    def counters(self) -> int:
        """Bytes: a number for each warp that has others to wait for."""
        return self.grid // self.split * CONSUMERS // 32 * 4 if self.split > 1 else 0

    def is_able(self) -> bool:
        if self.stages < FEWEST_STAGES or self.tile > MOST_TOKENS[cdiv(self.height, 2)]:
            return False
        if self.split == 1:
            return True
        # The blocks of a split wait for one another: all must be resident at once, or those that are wait for ever.
        resident = self.grid <= self.device.multiprocessors
        # Its parts are added up once, whole runs at a time; none may begin beyond K.
        return resident and not self.p.gated and self.passes == 1 and cdiv(self.tile, 16) >= self.split <= self.steps

    def cost(self) -> float:
        """Cycles of the busiest block."""
        p = self.p
        products = self.most * self.tile * COLUMN_CYCLES
        rows, columns = self.most * UNIT_ROWS, self.passes * self.tile
        # Every unit is written once and read once; the tokens are written in each pass and read by every unit.
        shared = LINE * (2 * rows + columns + self.most * self.tile) / READ_BYTES
        fill = LINE * (rows + columns) / FILL_BYTES
        left = self.most * UNIT_ROWS * self.tile * 4 * (self.split - 1) / self.split / LEFT_BYTES
        busy = self.steps * max(products, shared, fill) * (1 if self.stages >= EASY_STAGES else SHORT_RING)
        return START_CYCLES + busy + self.passes * (GATED_PASS_CYCLES if p.gated else PASS_CYCLES) + left

    def use(self) -> KernelUse:
        p = self.p
        constants: dict[str, int | str] = {
            "N": p.n, "K": p.k, "FORMAT": p.w.name, "OUT_BYTES": p.out.bytes,
            "BIAS_BYTES": p.bias.bytes if p.bias else 0, "ACT": ACTIVATIONS.index(p.act), "GATED": int(p.gated),
            "TILE_T": self.tile, "TILE_T_16": f"{self.tile // 16}{'H' if self.tile % 16 else ''}",
            "HEIGHT": self.height, "STAGES": self.stages, "SHARE_W": int(self.shares_w), "SPLIT": self.split,
            "ALONG": self.along, "STREAM": int(streams(p, self.device)),
        }  # fmt: skip
        given = operands(p)
        beside = [name for name in ("bias", "y") if name in given]
        parts = (("parts", "*fp32"), ("counters", "*i32")) if self.split > 1 else ()
        signature = (("x", "map"), ("w", "map"), *((n, given[n][1]) for n in beside), *parts, ("tokens", "i32"))
        kernel = CudaKernel(SOURCE, signature, tuple(constants.items()), WARPS, self.shared)
        turns = p.gated and p.n // 2 % 8 == 0
        box = ODD_BOX_ROWS if p.gated and not turns else BOX_ROWS
        x_rows = self.tile if self.shares_w else self.tile // CLUSTER
        args = (
            replace(given["x"][0], tile=Tile(p.x.name, (p.tokens, p.k), (x_rows, DEPTH))),
            replace(given["w"][0], tile=Tile(p.w.name, (p.n, p.k), (box, DEPTH), turns)),
            *(given[n][0] for n in beside), *(Arg(kind, 0) for kind in ("workspace", "zeroed") if parts),
            Arg("int", p.tokens),
        )  # fmt: skip
        # The blocks of a split wait for each other.
        return KernelUse(kernel, (self.grid, 1, 1), args, cooperative=self.split > 1)


class HopperTall(Tactic):
    """Some hundred tokens, cut up evenly; the units of w go evenly to all clusters."""

    op = "linear"
    name = "hopper_tall"

    LOW, HIGH = 129, 1024
    HEIGHTS = (2, 3, 4)
    SPLITS = (1, 2, 4)
    TILES = (1, 2, 4, 6, 8)
    TRIED = 3

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return hopper_refusal(site, sizes, device, self.LOW, self.HIGH)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        even = [Cut(p, device, 1, 1, cdiv(p.tokens, tiles)).tile for tiles in self.TILES]
        cuts = [Cut(p, device, *way) for way in product(self.HEIGHTS, self.SPLITS, even)]
        # Height that saves no pass only costs stages, and the lower ones come first.
        distinct = {(cut.split, cut.tile, cut.passes): cut for cut in reversed(cuts) if cut.is_able()}.values()
        best = sorted(distinct, key=Cut.cost)[: self.TRIED]
        return tuple({"HEIGHT": cut.height, "SPLIT": cut.split, "TILE": cut.tile} for cut in best)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        cut = Cut(Product.of(site, sizes), device, config["HEIGHT"], config["SPLIT"], config["TILE"])
        while cut.split > 1 and not cut.is_able():  # chosen for more tokens, whose tiles had runs for every part
            cut = replace(cut, split=cut.split // 2)
        return Draft((cut.use(),), cut.workspace, cut.counters)
