"""Products of heads with a matrix each: a tile of tokens and of one matrix's rows a program."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.tactic import (
    Config,
    Draft,
    KernelUse,
    Tactic,
    TritonKernel,
    cdiv,
    inputs,
    next_power_of_2,
    outputs,
)

SOURCE = "penstock.kernels.head_linear.tiled_triton:head_linear"
MAX_KEPT = 1024  # numbers of a head that are copied; they are one tile
# (TOKENS, ROWS, COLUMNS, STAGES, warps)
FEW = ((16, 64, 128, 3, 4), (16, 128, 64, 3, 4), (16, 32, 128, 3, 2))
MANY = ((128, 128, 64, 3, 8), (64, 128, 64, 3, 4), (128, 64, 64, 3, 4), (64, 64, 64, 3, 4))
PLAIN = ((16, 32, 32, 2, 4),)  # float32 has no tensor cores here


class Tiled(Tactic):
    """Tensor-core products at any number of tokens; of few, bound by the matrices' bytes."""

    op, name = "head_linear", "tiled"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := gpu.refusal(site, device, (0, 1), 80):
            return why
        if site.inputs[0].format != site.inputs[1].format:
            return f"operands are {site.inputs[0].format} and {site.inputs[1].format}; one format is needed"
        if int(site.attr("keep", 0)) > MAX_KEPT:
            return f"{site.attr('keep')} numbers of a head stay; at most {MAX_KEPT}"
        return None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        shapes = PLAIN if site.inputs[0].format.bytes == 4 else FEW if sizes["T"] <= 16 else MANY
        names = ("TOKENS", "ROWS", "COLUMNS", "STAGES", "warps")
        fitted = (_fitted(site, sizes, dict(zip(names, shape, strict=True))) for shape in shapes)
        return tuple({tuple(c.items()): c for c in fitted}.values())

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        (heads, rows, columns), keep = map(int, site.inputs[1].shape), int(site.attr("keep", 0))
        pointer = gpu.pointer(site.inputs[0])
        constants = {
            "H": heads, "OUT": rows, "IN": columns, "KEEP": keep, "KP": next_power_of_2(max(keep, 1)),
            **{name: config[name] for name in ("TOKENS", "ROWS", "COLUMNS", "STAGES")},
        }  # fmt: skip
        signature = (("x_ptr", pointer), ("w_ptr", pointer), ("y_ptr", pointer), ("tokens", "i32"))
        kernel = TritonKernel(
            SOURCE, signature, (*constants.items(), gpu.pdl(device)), config["warps"], config["STAGES"]
        )
        grid = (heads, cdiv(rows, config["ROWS"]), cdiv(sizes["T"], config["TOKENS"]))
        return Draft((KernelUse(kernel, grid, (*inputs(0, 1), *outputs(0), *gpu.integers(sizes["T"]))),))


def _fitted(site: Site, sizes: Sizes, config: dict[str, int]) -> Config:
    """No tile larger than what there is, nor smaller than a product takes."""
    _, rows, columns = map(int, site.inputs[1].shape)
    for name, size in (("TOKENS", sizes["T"]), ("ROWS", rows), ("COLUMNS", columns)):
        config[name] = min(config[name], max(16, next_power_of_2(size)))
    return config
