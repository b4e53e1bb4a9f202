"""What the tactics of attention over pages share: the shape of a site, and the kernels of short and of long rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.ir.ops.attention import EXTRAS
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, KernelUse, TritonKernel, cdiv, inputs, next_power_of_2

FOLDER = "penstock.kernels.attention"
MAX_GROUP = 128  # query heads of a KV head; they share a tile
MAX_COMBINED = 16384  # numbers of a group of heads; more would not fit in the registers that join a row's tasks
MAX_SHORT = 4  # queries of a row that is still split over its keys
MAX_SEQUENCES = 4096  # every program scans them
AT_ONCE = 2  # programs of the larger configuration on a multiprocessor
LEAST_KEYS = 256  # of a part of a tile of queries
JOINED = 32  # numbers of a part that a thread holds while four are joined


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a site shapes its kernels; its first input is the queries, or qkv, and its second the cache."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    pointer: str  # to queries and results
    pool: str  # to the cache
    bytes: int  # of a number of queries
    narrow: bool  # the cache is in fp8

    @staticmethod
    def of(site: Site) -> Shape:
        q, kv = site.inputs[:2]
        _, _, kv_heads, block, size = (0, *map(_int, kv.shape[1:]))
        return Shape(
            int(site.attr("heads")),
            kv_heads,
            size,
            block,
            gpu.pointer(q),
            gpu.pointer(kv),
            q.format.bytes,
            kv.format.bytes == 1,
        )

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def decode_rows(self) -> int:
        """Rows of a decode tile: the smallest that tensor cores take."""
        return max(16, next_power_of_2(self.group))

    @property
    def short(self) -> int:
        """A row of at most so many queries is split over its keys; its queries fill rows that one would leave empty.

        A power of two, so that a tile is [queries, heads].
        """
        return min(MAX_SHORT, self.decode_rows // next_power_of_2(self.group))

    @property
    def padded_size(self) -> int:
        return max(16, next_power_of_2(self.head_size))


def _int(dim: int | str) -> int:
    assert isinstance(dim, int), dim
    return dim


def refusal(site: Site, sizes: Sizes, device: Device) -> str | None:
    """Why neither family of kernels can run on the site's first two inputs (queries or qkv, and the cache)."""
    if why := gpu.refusal(site, device, (0, 1), 80):
        return why
    q, kv, y = (t.format.name for t in (*site.inputs[:2], site.outputs[0]))
    if q != y or (kv != q and kv in gpu.FLOATS):
        return f"queries, cache and result must share one format, not {q}, {kv} and {y}, but for a cache in fp8"
    shape = Shape.of(site)
    if shape.narrow and shape.head_size % 2:
        return f"heads of {shape.head_size} numbers; of a cache in fp8 they are read in pairs"
    if shape.block_size < 16 or shape.block_size & (shape.block_size - 1):
        return f"blocks of {shape.block_size} tokens; a power of two from 16 is needed"
    if shape.head_size > 256:
        return f"heads of {shape.head_size} numbers; at most 256"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads for each KV head; at most {MAX_GROUP}"
    if next_power_of_2(shape.group) * shape.padded_size > MAX_COMBINED:
        return f"{shape.group} query heads of {shape.head_size} for each KV head; at most {MAX_COMBINED} numbers"
    if not site.attr("scale") > 0:
        return f"scores are scaled by {site.attr('scale')}; only positive scales keep the largest score the largest"
    if sizes["S"] > MAX_SEQUENCES:
        return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}"
    return None


@dataclass(frozen=True, slots=True)
class Tasks:
    """How short rows are cut in one bucket, and the memory that joining their tasks takes."""

    aim: int  # tasks for each KV head if contexts are even: what keeps the device busy
    least: int  # tiles of a task: joining costs more than so few could save
    most: int  # tasks that there can be for each KV head
    partial: int  # bytes of the tasks' sums; their maxima and totals lie behind
    workspace: int
    counters: int  # bytes of zeroed memory

    @staticmethod
    def of(shape: Shape, sizes: Sizes, device: Device, config: Config) -> Tasks:
        rows = min(sizes["S"], sizes["T"])
        tiles = rows * cdiv(sizes["M"] * shape.block_size, config["BN"])
        aim = cdiv(max(device.multiprocessors, 1) * config["TASKS"], shape.kv_heads)
        aim = max(1, min(aim, cdiv(tiles, config["LEAST"])))
        lanes = (aim + rows) * shape.kv_heads * shape.decode_rows
        partial = cdiv(lanes * shape.head_size * 4, 256) * 256
        counters = sizes["S"] * shape.kv_heads * 4
        return Tasks(aim, config["LEAST"], aim + rows, partial, partial + lanes * 2 * 4, counters)


@dataclass(frozen=True, slots=True)
class Parts:
    """How tiles of long rows are cut over their keys in one bucket where they are few, and the memory that it takes."""

    aim: int  # tasks for each KV head that run at once; so many tiles, or more, are not cut
    least: int  # tiles of keys of a part
    most: int  # tasks that there can be for each KV head
    cut: int  # of them in steps that are cut; 0: none ever is, or only where a step is far smaller than its bucket
    partial: int  # bytes of the tasks' sums; their maxima and totals lie behind
    workspace: int
    counters: int  # bytes of zeroed memory

    @staticmethod
    def of(shape: Shape, sizes: Sizes, device: Device, config: Config, short: int) -> Parts:
        tiles = most_tiles(sizes, short, config["PM"] // shape.group)
        least = max(1, LEAST_KEYS // config["PN"])
        parts = max(1, cdiv(sizes["M"] * shape.block_size, config["PN"]) // least)
        aim = device.multiprocessors * config["PTASKS"] // shape.kv_heads
        aim = max(1, min(aim, tiles * parts))
        # A step of less than half a bucket's tokens runs in a smaller one.
        full = (sizes["T"] // 2 - sizes["S"] * short) // (config["PM"] // shape.group) >= aim
        cut = 0 if full or aim == 1 or parts == 1 else aim + min(tiles, aim - 1)
        lanes = cut * shape.kv_heads * config["PM"]
        partial = cdiv(lanes * shape.head_size * 4, 256) * 256
        return Parts(aim, least, max(tiles, cut), cut, partial, partial + lanes * 2 * 4, cut * shape.kv_heads * 4)


def decode_configs(shape: Shape, few: bool) -> tuple[dict[str, int], ...]:
    """BN: keys of a tile; TASKS: tasks aimed at for each multiprocessor; LEAST: tiles of a task; APART: warps that each
    take a share of a tile's keys by themselves (1: all together). `few`: AT_ONCE programs a multiprocessor hold a task
    of every row."""
    if shape.bytes == 4:
        return (
            {"BN": plain_keys(shape), "STAGES": 2, "WARPS": plain_warps(shape), "TASKS": 4, "LEAST": 1, "APART": 1},
        )
    if shape.decode_rows > 32 or shape.padded_size > 128:
        together = {"BN": 64 if shape.padded_size <= 128 else 32, "STAGES": 3, "APART": 1}
        together["WARPS"] = 8 if shape.decode_rows > 32 else 4
        return tuple({**together, "TASKS": n, "LEAST": 4} for n in (2, 4))
    # Joining tasks costs about as much as 256 keys.
    apart = {"BN": 64, "WARPS": 4, "APART": 4, "STAGES": 3, "TASKS": 2, "LEAST": 4}
    if shape.narrow:  # three fit on a multiprocessor; of many rows more are aimed at, for the last round to be short
        return (apart,) if few else ({**apart, "STAGES": 4, "TASKS": 4},)
    # Small enough for four on a multiprocessor, so that those of many rows run at once. Those of few would crowd on the
    # multiprocessors that the kernel ahead leaves first, which the timing of one op by itself does not see.
    return (apart,) if few else ({**apart, "APART": 1, "STAGES": 2}, apart)


def plain_keys(shape: Shape) -> int:
    return 32 if shape.padded_size <= 128 and shape.decode_rows <= 32 and not shape.narrow else 16


def plain_warps(shape: Shape) -> int:
    """float32 has no tensor cores here: small tiles, or registers spill."""
    return 8 if shape.padded_size * max(16, next_power_of_2(shape.group)) >= 2048 else 4


def prefill_configs(shape: Shape) -> tuple[dict[str, int], ...]:
    """PM, PN: rows and keys of a tile; PTASKS: tasks of a few tiles aimed at for each multiprocessor."""
    if shape.bytes == 4:
        tile = {"PM": shape.decode_rows, "PN": plain_keys(shape), "PSTAGES": 2, "PWARPS": plain_warps(shape)}
        return ({**tile, "PTASKS": 2},)
    if shape.padded_size > 128:
        return ({"PM": 64 if shape.narrow else 128, "PN": 32, "PSTAGES": 2, "PWARPS": 8, "PTASKS": 1},)
    big = {"PM": 128, "PN": 64, "PSTAGES": 3, "PWARPS": 8, "PTASKS": 1}
    if shape.narrow:  # widening costs the same whatever the rows; four warps are faster, though some registers spill
        return (big, {**big, "PWARPS": 4})
    if shape.group > 64:
        return (big,)
    # Two programs of four warps share a multiprocessor: one multiplies while the other takes exponents.
    small = {**big, "PM": 64, "PWARPS": 4, "PTASKS": 2}
    return (small, {**big, "PN": 128, "PSTAGES": 2}, big) if shape.padded_size <= 64 else (small, big)


def paired(decode: tuple[dict[str, int], ...], prefill: tuple[dict[str, int], ...]) -> tuple[Config, ...]:
    """Configurations of both families at once: the first of each, and every other beside the first of the other."""
    first = ({**decode[0], **prefill[0]},)
    return (*first, *({**d, **prefill[0]} for d in decode[1:]), *({**decode[0], **p} for p in prefill[1:]))


def tunables(site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
    """Configurations worth timing; where no row can be long, those of `prefill` do not matter."""
    shape = Shape.of(site)
    few = min(sizes["S"], sizes["T"]) * shape.kv_heads <= AT_ONCE * max(device.multiprocessors, 1)
    long = prefill_configs(shape)
    return paired(decode_configs(shape, few), long[:1] if sizes["T"] <= shape.short else long)


def constants(site: Site, sizes: Sizes, device: Device, short: int) -> dict[str, Any]:
    shape = Shape.of(site)
    pdl, able = gpu.pdl(device)
    names = site.attr("extras", ())
    return {
        "H": shape.heads,
        "K": shape.kv_heads,
        "D": shape.head_size,
        "DP": shape.padded_size,
        "B": shape.block_size,
        "SP": scanned(sizes["S"]),
        "SHORT": short,
        "SCALE": float(site.attr("scale")),
        "SOFTCAP": float(site.attr("softcap", 0.0)),
        "WINDOW": int(site.attr("window", 0)),
        pdl: able,
        **{f"{name}_ptr": None for name in EXTRAS if name not in names},
        "R": int(site.inputs[names.index("distances") - len(names)].shape[1]) if "distances" in names else 1,
    }


def short_constants(shape: Shape, config: Config) -> dict[str, int]:
    """Those of a kernel of short rows."""
    return {"BM": shape.decode_rows, "BN": config["BN"], "W": config["APART"], "NATIVE": True}


def scanned(sequences: int) -> int:
    """Few different lengths, so that few kernels are compiled."""
    return next(n for n in (1, 32, 128, 512, 4096) if n >= sequences)


def extras(site: Site) -> tuple[tuple[tuple[str, str], ...], tuple[Arg, ...]]:
    """Pointers to what belongs to the site's heads beside its keys, its last inputs: names and types, and where."""
    names = site.attr("extras", ())
    first = len(site.inputs) - len(names)
    signature = tuple((f"{name}_ptr", gpu.pointer(site.inputs[first + i])) for i, name in enumerate(names))
    return signature, inputs(*range(first, len(site.inputs)))


ROWS = (("query_start_ptr", "*i32"), ("query_len_ptr", "*i32"), ("context_len_ptr", "*i32"))


def prefill(site: Site, sizes: Sizes, device: Device, config: Config, short: int, args: tuple[Arg, ...]) -> KernelUse:
    """Rows of more than `short` queries.

    `args`: queries, cache, query_start, query_len, context_len, block_table, result.
    """
    shape = Shape.of(site)
    parts = Parts.of(shape, sizes, device, config, short)
    pointers, given = extras(site)
    signature = (
        ("q_ptr", shape.pointer), ("kv_ptr", shape.pool), *ROWS, ("table_ptr", "*i32"),
        ("out_ptr", shape.pointer), ("acc_ptr", "*fp32"), ("ml_ptr", "*fp32"), ("count_ptr", "*i32"), *pointers,
        ("S", "i32"), ("M", "i32"), ("programs", "i32"), ("least", "i32"),
    )  # fmt: skip
    columns = min(shape.padded_size, 32 * config["PWARPS"] * JOINED // config["PM"])
    tile = {"DC": columns, "PM": config["PM"], "PN": config["PN"], "CUT": parts.cut > 0}
    named = {**constants(site, sizes, device, short), **tile}
    kernel = triton_kernel(f"{FOLDER}.prefill_triton:prefill", signature, named, config["PWARPS"], config["PSTAGES"])
    memory = (*gpu.workspace(0, parts.partial), *gpu.zeroed(0))
    args = (*args, *memory, *given, *gpu.integers(sizes["S"], sizes["M"], parts.aim, parts.least))
    return KernelUse(kernel, (parts.most * shape.kv_heads, 1, 1), args, singles=False)


def most_tiles(sizes: Sizes, short: int, tile: int) -> int:
    """The most tiles of `tile` queries that rows of more than `short` queries can need.

    ceil(n / tile) <= (n - 1) / tile + 1, so R rows of T queries together need at most R + (T - R) / tile, which grows
    with R; and R is at most T / (short + 1).
    """
    rows = min(sizes["S"], sizes["T"] // (short + 1))
    return max(1, rows + (sizes["T"] - rows) // tile)


def triton_kernel(
    source: str, signature: tuple[tuple[str, str], ...], named: dict[str, Any], warps: int, stages: int
) -> TritonKernel:
    return TritonKernel(source, signature, tuple(named.items()), warps, stages)
