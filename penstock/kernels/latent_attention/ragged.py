"""Latent attention for any ragged mixture, by one kernel: all heads read one key, so they fill a tile's rows."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.attention.shape import JOINED, MAX_SEQUENCES, ROWS, Parts, Shape, scanned, triton_kernel
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, inputs, next_power_of_2, outputs

SOURCE = "penstock.kernels.latent_attention.ragged_triton:latent_attention"
MAX_RANK = 512  # numbers of a value: the sums of a tile of them lie in registers
# (PM, PN, STAGES, WARPS, PTASKS), see `attention.shape`
SHAPES = ((64, 32, 2, 8, 1), (32, 32, 2, 4, 2), (16, 64, 2, 4, 2))
PLAIN = ((16, 16, 2, 8, 2),)  # float32 has no tensor cores here


@dataclass(frozen=True, slots=True)
class Latents:
    """Sizes of a site: a key is `turned` numbers and a latent of `rank`; of `heads` `group` share a tile."""

    heads: int
    group: int
    turned: int
    rank: int
    block_size: int

    @staticmethod
    def of(site: Site, rows: int) -> Latents:
        heads, rank, width = int(site.attr("heads")), int(site.attr("rank")), gpu.width(site.inputs[1])
        group = max(n for n in range(1, min(rows, heads) + 1) if heads % n == 0)
        return Latents(heads, group, width - rank, rank, int(site.inputs[1].shape[3]))

    def parts(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Parts:
        """As of attention whose KV heads are the groups."""
        q, kv = site.inputs[:2]
        kv_heads, pointers = self.heads // self.group, (gpu.pointer(q), gpu.pointer(kv))
        shape = Shape(self.heads, kv_heads, self.rank, self.block_size, *pointers, q.format.bytes, False)
        return Parts.of(shape, sizes, device, config, 0)


class Ragged(Tactic):
    """A tile of queries times heads a program; where tiles are few, as of single tokens, their keys are cut into parts,
    and the last part to end joins them in order. Sequences stand in the step as for attention. Tokens of no sequence,
    behind the last, become zero."""

    op, name = "latent_attention", "ragged"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := gpu.refusal(site, device, (0, 1), 80):
            return why
        q, kv = (t.format.name for t in site.inputs[:2])
        if kv != q and kv in gpu.FLOATS:
            return f"queries and cache must share one format, not {q} and {kv}, but for a cache in fp8"
        block, rank = int(site.inputs[1].shape[3]), int(site.attr("rank"))
        if block < 16 or block & (block - 1):
            return f"blocks of {block} tokens; a power of two from 16 is needed"
        if rank > MAX_RANK or gpu.width(site.inputs[1]) - rank not in range(1, MAX_RANK + 1):
            return f"keys of {gpu.width(site.inputs[1])} with latents of {rank} numbers; at most {MAX_RANK}, and others"
        if sizes["S"] > MAX_SEQUENCES:
            return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}"
        return None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        shapes = PLAIN if site.inputs[0].format.bytes == 4 else SHAPES
        rows = max(16, next_power_of_2(int(site.attr("heads")) * sizes["T"]))
        fitting = [shape for shape in shapes if shape[0] <= rows] or shapes[-1:]
        return tuple(dict(zip(("PM", "PN", "STAGES", "WARPS", "PTASKS"), shape, strict=True)) for shape in fitting)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        it = Latents.of(site, config["PM"])
        parts, groups, padded = it.parts(site, sizes, device, config), it.heads // it.group, next_power_of_2(it.rank)
        q, kv = map(gpu.pointer, site.inputs[:2])
        signature = (
            ("q_ptr", q), ("kv_ptr", kv), *ROWS, ("table_ptr", "*i32"), ("out_ptr", q), ("acc_ptr", "*fp32"),
            ("ml_ptr", "*fp32"), ("count_ptr", "*i32"), ("T", "i32"), ("S", "i32"), ("M", "i32"), ("programs", "i32"),
            ("least", "i32"),
        )  # fmt: skip
        constants = {
            "H": it.heads, "K": groups, "R": it.turned, "RP": max(16, next_power_of_2(it.turned)), "C": it.rank,
            "CP": max(16, padded), "DC": min(max(16, padded), 32 * config["WARPS"] * JOINED // config["PM"]),
            "B": it.block_size, "SP": scanned(sizes["S"]), "PM": config["PM"], "PN": config["PN"],
            "CUT": parts.cut > 0, "SCALE": float(site.attr("scale")), **dict([gpu.pdl(device)]),
        }  # fmt: skip
        kernel = triton_kernel(SOURCE, signature, constants, config["WARPS"], config["STAGES"])
        numbers = gpu.integers(sizes["T"], sizes["S"], sizes["M"], parts.aim, parts.least)
        memory = (*gpu.workspace(0, parts.partial), *gpu.zeroed(0))
        use = KernelUse(kernel, ((1 + parts.most) * groups, 1, 1), (*inputs(*range(6)), *outputs(0), *memory, *numbers))
        return Draft((use,), parts.workspace, parts.counters)
