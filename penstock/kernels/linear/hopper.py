"""Products by `hopper.cu`: bulk tensor copies feed warp-group products. For compute capability 9.0 alone.

Two tactics of one kernel: `hopper` for many tokens, bound by arithmetic, and `hopper_stream` for few, bound by reading
the weights.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from math import ceil
from types import MappingProxyType

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes, Tile
from penstock.ir.ops import pointwise
from penstock.kernels.linear import product
from penstock.kernels.linear.product import NO_NORM, Norm, Operands, Product, operands, shared_limit
from penstock.kernels.tactic import Config, CudaKernel, Draft, KernelUse, Tactic, cdiv, next_power_of_2

SOURCE = "penstock.kernels.linear.hopper:hopper"
NAMES = (
    "bias",
    "squares",
    "residual",
    "gain",
    "y",
    "scaled",
    "shares",
    "owners",
    "used",
)  # in the order of the kernel's parameters
CAPABILITY = 90
FORMATS = ("bf16", "f16")
ALIGNED_COLUMNS = 8  # the copy engine wants rows that start at multiples of 16 bytes
DEPTH, LINE = 64, 128  # columns of K in a stage, and their bytes
GROUP_TOKENS = 64  # of a warp group
ACTIVATIONS = ("", *pointwise.ACTIVATIONS)  # as values.cuh numbers them
BARRIER_BYTES = 16  # of a stage
RESERVED = 1 << 10  # bytes of shared memory that the system takes of each block
MAX_STAGES = 16
STREAMED = 256  # tokens up to which w is read about once
EVEN_ROUNDS = 2  # of tiles on each multiprocessor, after which the last one hardly matters
# What a multiprocessor could read, by timing, while it begins and ends a tile (less where a second block reads), and
# while a cluster adds its shares up.
LONE_BYTES, PAIRED_BYTES, SPLIT_BYTES = 96 << 10, 32 << 10, 32 << 10
FEWEST_STAGES = 4  # that keep memory busy
X_SHARE = 0.1  # the cost of a byte of x, which comes from the L2, in bytes of w
L2_GROUP = 8  # tiles of tokens that share a stretch of w in the L2


@dataclass(frozen=True, slots=True)
class Shape:
    """How a product is cut up; the constants of hopper.cu."""

    warp_groups: int
    rows: int
    share: int = 1
    split: int = 1
    blocks: int = 1  # that one multiprocessor holds
    persistent: bool = False

    @property
    def cluster(self) -> int:
        return self.share * self.split

    @property
    def tokens(self) -> int:
        return GROUP_TOKENS * self.warp_groups

    @property
    def warps(self) -> int:
        """Consumers, and one warp that produces; a whole warp group of them where registers move between groups."""
        return 4 * self.warp_groups + (4 if self.warp_groups > 1 else 1)

    def x_rows(self, p: Product) -> int:
        """Rows of x that a tile loads: few more than there are, in whole patterns of the swizzle."""
        return min(self.tokens, max(8, next_power_of_2(p.tokens)))

    def stage(self, p: Product) -> int:
        """Bytes of a stage and its barriers."""
        return (self.rows + self.x_rows(p)) * LINE + BARRIER_BYTES

    def stages(self, p: Product, device: Device) -> int:
        """As many as the block's share of shared memory holds."""
        room = (shared_limit(device) + RESERVED) // self.blocks - RESERVED - self.mail(p)
        return min(MAX_STAGES, room // self.stage(p))

    def runs(self, p: Product) -> int:
        """Runs of eight columns of y in a tile; each is added up by one block of a split."""
        return self.rows // 8 // (2 if p.gated else 1)

    def mail(self, p: Product) -> int:
        """Bytes that the others of a split send to a block, and their barrier."""
        if self.split == 1:
            return 0
        runs, matrices = cdiv(self.runs(p), self.split), 2 if p.gated else 1
        return (self.split - 1) * runs * matrices * self.warp_groups * 128 * 16 + BARRIER_BYTES

    def shared(self, p: Product, device: Device) -> int:
        return self.stages(p, device) * self.stage(p) + self.mail(p)

    def clusters(self, p: Product) -> int:
        """Tiles that a cluster works on as a whole."""
        return cdiv(p.tokens, self.tokens * self.share) * cdiv(p.n, self.rows)

    def grid(self, p: Product, device: Device) -> int:
        clusters = self.clusters(p)
        if self.persistent:
            clusters = min(clusters, max(1, device.multiprocessors // self.cluster))
        return clusters * self.cluster


def hopper_refusal(site: Site, sizes: Sizes, device: Device, low: int, high: int | None) -> str | None:
    """Why no kernel of this kind fits, for low..high tokens."""
    if device.kind == "cuda" and device.capability != CAPABILITY:
        return f"written for compute capability {CAPABILITY / 10} alone, not {device.capability / 10}"
    if why := product.refusal(site, sizes, device, low, high):
        return why
    p = Product.of(site, sizes)
    if 1 not in site.weights:
        return "w is made by the step; it is fetched before the kernels that might make it have ended"
    if p.w.name not in FORMATS:
        return f"w is {p.w}; supported are {', '.join(FORMATS)}"
    if p.k % ALIGNED_COLUMNS:
        return f"K is {p.k}; the copy engine wants a multiple of {ALIGNED_COLUMNS}"
    if any(f.name not in (p.w.name, "f32") for f in (p.out, p.bias) if f is not None):
        return f"result {p.out} and bias {p.bias} are neither {p.w} nor f32"
    return None


class HopperProduct(Tactic):
    """What both tactics have in common."""

    low: int
    high: int | None

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return hopper_refusal(site, sizes, device, self.low, self.high)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        p = Product.of(site, sizes)
        return Draft((hopper_use(p, device, self.shape(p, config), operands(p)),))

    @abstractmethod
    def shape(self, p: Product, config: Config) -> Shape:
        """The kernel's shape in a configuration."""


def hopper_use(
    p: Product, device: Device, shape: Shape, given: Operands, norm: Norm = NO_NORM, experts: int = 0
) -> KernelUse:
    """One launch. `norm`: of what goes in (squares) or comes out (residual). `experts`: w has a matrix for each."""
    stages, x_rows = shape.stages(p, device), shape.x_rows(p)
    constants: dict[str, int | str] = {
        "N": p.n, "K": p.k, "FORMAT": p.w.name, "OUT_BYTES": p.out.bytes, "BIAS_BYTES": p.bias.bytes if p.bias else 0,
        "ACT": ACTIVATIONS.index(p.act), "GATED": int(p.gated), "WARP_GROUPS": shape.warp_groups, "ROWS": shape.rows,
        "ROWS_16": shape.rows // 16, "STAGES": stages, "X_ROWS": x_rows, "SHARE": shape.share, "SPLIT": shape.split,
        "GROUP": L2_GROUP, "PERSISTENT": int(shape.persistent), "STREAM": int(streams(p, device)),
        "BLOCKS": shape.blocks, "PARTS": norm.parts, "EPS": f"{norm.eps!r}f", "RESIDUAL": int("residual" in given),
        "OFFSET": f"{norm.offset!r}f", "EXPERTS": experts,
    }  # fmt: skip
    beside = [name for name in NAMES if name in given]
    signature = (("x", "map"), ("w", "map"), *((name, given[name][1]) for name in beside), ("tokens", "i32"))
    kernel = CudaKernel(SOURCE, signature, tuple(constants.items()), shape.warps, shape.shared(p, device))
    args = (
        replace(given["x"][0], tile=Tile(p.x.name, (p.tokens, p.k), (x_rows, DEPTH))),
        replace(given["w"][0], tile=Tile(p.w.name, (max(1, experts) * p.n, p.k), (shape.rows // 2, DEPTH))),
        *(given[name][0] for name in beside), Arg("int", p.tokens),
    )  # fmt: skip
    return KernelUse(kernel, (shape.grid(p, device), 1, 1), args)


def streams(p: Product, device: Device) -> bool:
    """Whether w is read about once and y is small: then w had better not push others out of the L2."""
    return p.tokens <= STREAMED and p.tokens * p.n * p.out.bytes <= device.l2_bytes // 4


class Hopper(HopperProduct):
    """Many tokens: 128 a block; two blocks share a tile of w, copied to both at once; each walks over tiles."""

    op = "linear"
    name = "hopper"
    low, high = 2 * GROUP_TOKENS + 1, None

    ROWS = (256, 224, 192, 128, 96, 64)
    TILE_COST = 24  # rows of w that a tile costs beside its own: filling the ring, storing
    TRIED = 3

    def shape(self, p: Product, config: Config) -> Shape:
        return Shape(2, config["ROWS"], share=2, persistent=True)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        configs: list[Config] = [{"ROWS": rows} for rows in self.ROWS]
        return tuple(sorted(configs, key=lambda c: self._cost(p, self.shape(p, c), device))[: self.TRIED])

    def _cost(self, p: Product, shape: Shape, device: Device) -> int:
        waves = cdiv(shape.clusters(p), max(1, device.multiprocessors // shape.cluster))
        return waves * (shape.rows + self.TILE_COST)


class HopperStream(HopperProduct):
    """Few tokens, a tile a block: two blocks a multiprocessor, or one with a deep ring and K split over a cluster."""

    op = "linear"
    name = "hopper_stream"
    low, high = 2, 2 * GROUP_TOKENS

    ROWS = (224, 192, 160, 128, 112, 96, 64)
    SPLITS = (2, 1, 4, 8)
    USABLE = MappingProxyType({1: 1.0, 2: 1.0, 4: 0.88, 8: 0.8})  # multiprocessors that clusters of a size can fill
    TRIED = 3

    def shape(self, p: Product, config: Config) -> Shape:
        groups = 1 if p.tokens <= GROUP_TOKENS else 2
        return Shape(groups, config["ROWS"], split=config["SPLIT"], blocks=2 if groups == config["SPLIT"] == 1 else 1)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        splits = [s for s in self.SPLITS if s == 1 or p.k >= 2 * s * DEPTH]
        configs: list[Config] = [{"ROWS": rows, "SPLIT": split} for split in splits for rows in self.ROWS]
        able = [c for c in configs if self._is_able(p, self.shape(p, c), device)]
        return tuple(sorted(able, key=lambda c: self._cost(p, self.shape(p, c), device))[: self.TRIED])

    def _is_able(self, p: Product, shape: Shape, device: Device) -> bool:
        return shape.stages(p, device) >= FEWEST_STAGES and shape.runs(p) >= shape.split

    def _cost(self, p: Product, shape: Shape, device: Device) -> float:
        """Bytes that the busiest multiprocessor reads, and what it could have read while nothing was under way."""
        places = max(1, int(device.multiprocessors * self.USABLE[shape.cluster]) // shape.cluster) * shape.blocks
        rounds = shape.clusters(p) / places
        rounds = rounds + 0.25 if rounds > EVEN_ROUNDS else ceil(rounds)
        tile = (shape.rows + X_SHARE * shape.x_rows(p)) * p.k * p.w.bytes / shape.split
        idle = PAIRED_BYTES if shape.blocks > 1 else LONE_BYTES
        return rounds * (shape.blocks * (tile + idle) + SPLIT_BYTES * (shape.split - 1))
