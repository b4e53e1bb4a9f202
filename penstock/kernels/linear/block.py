"""The products from one attention to the next in one launch, by `block.cu`. For compute capability 9.0 alone.

All of its blocks meet several times, so all must be resident: the launch is cooperative, and where a device could not
hold them it fails instead of hanging.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from penstock.engine.device import Device
from penstock.engine.program import Arg, Tile
from penstock.kernels import gpu
from penstock.kernels.linear.hopper import ACTIVATIONS, BARRIER_BYTES, DEPTH, FEWEST_STAGES, GROUP_TOKENS, LINE
from penstock.kernels.linear.product import Operands, Product, shared_limit
from penstock.kernels.tactic import CudaKernel, Draft, KernelUse, cdiv, next_power_of_2

SOURCE = "penstock.kernels.linear.block:dense_block"
RUN = 8  # columns that are stored at once
MAX_ROWS = {1: 256, 2: 192}  # of a tile, by warp groups: what their registers hold
MAX_ROUNDS = 3
HELPERS = 5  # warps
MAX_SLOTS, MAX_CHUNKS = 16, 4
X_BYTES = 48 << 10  # of the ring of x
SLOT_BYTES = 24 << 10  # of w; larger ones would be too few
UNDER_WAY = 64 << 10  # bytes of w: enough for memory's latency, and few enough that all blocks get the same
EVENT_BYTES = 128  # from one event's counter to the next


@dataclass(frozen=True, slots=True)
class Block:
    """Sizes as in block.cu: x [tokens,q], w0 [e,q], w1 [2f,e], w2 [e,f], w3 [n,e]."""

    tokens: int
    q: int
    e: int
    f: int
    n: int

    @property
    def groups(self) -> int:
        """Warp groups that multiply."""
        return cdiv(self.tokens, GROUP_TOKENS)

    @property
    def x_rows(self) -> int:
        """Rows of x in a slot: few more than there are tokens, in whole patterns of the swizzle."""
        return max(8, next_power_of_2(self.tokens))


@dataclass(frozen=True, slots=True)
class Cut:
    """How the weights are dealt out: `clusters` of two blocks, which split K except in the gated product's `rounds`."""

    block: Block
    clusters: int
    rounds: int

    @property
    def workers(self) -> int:
        return 2 * self.clusters

    @property
    def rows(self) -> tuple[int, int, int, int]:
        """Of a tile of each product, in sixteens."""
        b = self.block
        needs = (cdiv(b.e, self.clusters), cdiv(2 * b.f, self.workers * self.rounds), cdiv(b.n, self.clusters))
        sums, gated, last = (cdiv(rows, 16) * 16 for rows in needs)
        return sums, gated, sums, last

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """K of each product."""
        return self.block.q, self.block.e, self.block.f, self.block.e

    @property
    def read(self) -> int:
        """Numbers of the weights that the busiest block reads."""
        halves = sum(self.rows[i] * self.columns[i] // 2 for i in (0, 2, 3))
        return halves + self.rounds * self.rows[1] * self.columns[1]

    @property
    def slot(self) -> int:
        """Bytes of a slot of w: of those sizes that some tile fills with whole chunks, the one best used by all."""
        least = max(self.rows) * LINE
        sizes = {rows * LINE * chunks for rows in self.rows for chunks in range(1, MAX_CHUNKS + 1)}
        able = [s for s in sizes if least <= s <= max(least, SLOT_BYTES)]
        return max(able, key=lambda s: (min(self._used(s)), s))

    def _used(self, slot: int) -> list[float]:
        return [rows * LINE * (slot // (rows * LINE)) / slot for rows in self.rows]

    @property
    def chunks(self) -> tuple[int, ...]:
        """DEPTH columns each, of a tile of w in a slot; both blocks of a cluster get a slot of what they share."""
        split = (2, 1, 2, 2)
        pairs = zip(self.rows, self.columns, split, strict=True)
        return tuple(max(1, min(self.slot // (r * LINE), k // (DEPTH * s))) for r, k, s in pairs)

    @property
    def x_slots(self) -> int:
        return min(MAX_SLOTS, max(FEWEST_STAGES, X_BYTES // (self.block.x_rows * LINE)))

    @property
    def window(self) -> int:
        return cdiv(UNDER_WAY, self.slot)

    def w_slots(self, device: Device) -> int:
        return (shared_limit(device) - self._beside) // (self.slot + BARRIER_BYTES)

    def shared(self, device: Device) -> int:
        """Bytes of shared memory."""
        return self._beside + self.w_slots(device) * (self.slot + BARRIER_BYTES)

    @property
    def _beside(self) -> int:
        """Bytes beside the ring of w: that of x, what a cluster exchanges, rows' scales, other barriers."""
        x = self.x_slots * (self.block.x_rows * LINE + BARRIER_BYTES)
        mail = max(self.rows[0], self.rows[3]) * self.block.groups * LINE
        return x + mail + 4 * GROUP_TOKENS * self.block.groups + 8 * (5 + self.rounds)


def best_cut(block: Block, device: Device) -> Cut | str:
    """The cut whose busiest block reads least, or why there is none."""
    if odd := [size for size in (block.q, block.e, block.f, block.n) if size % RUN]:
        return f"{odd[0]} columns; the kernel stores {RUN} at a time"
    if min(block.q, block.e, block.f) < 2 * DEPTH:
        return f"K is {min(block.q, block.e, block.f)}; two blocks share at least {2 * DEPTH}"
    cuts = [c for c in _cuts(block, device) if max(c.rows) <= MAX_ROWS[block.groups]]
    able = [c for c in cuts if c.w_slots(device) >= max(FEWEST_STAGES, c.window + 1)]
    if not able:
        return f"{device.multiprocessors} multiprocessors would need tiles too large for registers and shared memory"
    return min(able, key=lambda c: (c.read, -c.rounds, c.clusters))


def _cuts(block: Block, device: Device) -> Iterator[Cut]:
    """More rounds let the product behind begin with what the first ones have left."""
    most = device.multiprocessors // 2
    for clusters in range(most, most * 3 // 4, -1):
        for rounds in range(1, MAX_ROUNDS + 1):
            yield Cut(block, clusters, rounds)


def block_draft(cut: Cut, device: Device, p: Product, given: Operands, eps: float, offset: float) -> Draft:
    """The launch and its memory. `p`: the gated product; `given`: x, w0 .. w3, what stands beside, y and total."""
    b, rows, sixteenths = cut.block, cut.rows, tuple(r // 16 for r in cut.rows)
    bias = given["bias"][1] if "bias" in given else None
    constants: dict[str, int | str] = {
        "FORMAT": p.w.name, "Q": b.q, "E": b.e, "F": b.f, "N": b.n, "ACT": ACTIVATIONS.index(p.act),
        "OFFSET": f"{offset!r}f", "EPS": f"{eps!r}f", "BIAS_BYTES": 0 if bias is None else 4 if bias == "*fp32" else 2,
        "WARP_GROUPS": b.groups, "X_ROWS": b.x_rows, "WORKERS": cut.workers,
        "ROWS_SUM": rows[0], "ROWS_GATED": rows[1], "ROWS_NEXT": rows[3],
        "SUM_16": sixteenths[0], "GATED_16": sixteenths[1], "NEXT_16": sixteenths[3],
        **{f"CHUNKS_{i}": chunks for i, chunks in enumerate(cut.chunks)},
        "W_SLOTS": cut.w_slots(device), "X_SLOTS": cut.x_slots, "WINDOW": cut.window,
    }  # fmt: skip
    shares = b.tokens * 2 * cdiv(b.e, rows[0]) * 4
    stream, wide = b.tokens * b.e * 2, b.tokens * b.f * 2
    (scaled, sums, h, again, more), workspace = gpu.layout(stream, shares, wide, stream, shares)
    own = {"scaled_1": (scaled, "*bf16"), "shares_1": (sums, "*fp32"), "h": (h, "*bf16"), "scaled_2": (again, "*bf16"),
           "shares_2": (more, "*fp32")}  # fmt: skip
    inner = (given["x"][0], *(Arg("workspace", at) for at in (scaled, h, again)))
    heights = (rows[0], rows[1] // 2, rows[2], rows[3])
    outer = (b.e, 2 * b.f, b.e, b.n)
    maps: list[Arg] = []
    for i, k in enumerate(cut.columns):
        maps.append(replace(inner[i], tile=Tile(p.x.name, (b.tokens, k), (b.x_rows, DEPTH))))
        maps.append(replace(given[f"w{i}"][0], tile=Tile(p.w.name, (outer[i], k), (heights[i], DEPTH))))
    beside = [name for name in ("residual", "gain_1", "gain_2", "bias", "y", "total") if name in given]
    signature = (
        *((f"{name}{i}", "map") for i in range(4) for name in "xw"), *((name, given[name][1]) for name in beside),
        *((name, type) for name, (_, type) in own.items()), ("events", "*i32"), ("tokens", "i32"),
    )  # fmt: skip
    args = (
        *maps, *(given[name][0] for name in beside), *(Arg("workspace", at) for at, _ in own.values()),
        Arg("zeroed", 0), Arg("int", b.tokens),
    )  # fmt: skip
    kernel = CudaKernel(SOURCE, signature, tuple(constants.items()), 4 * b.groups + HELPERS, cut.shared(device))
    use = KernelUse(kernel, (cut.workers, 1, 1), args, cooperative=True)
    return Draft((use,), workspace, EVENT_BYTES * (cut.rounds + 3))
