"""Experts by the kernel of `linear/hopper.py`: rows are copied into the order of experts, so that boxes are whole."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.ir.graph import Type
from penstock.kernels import gpu
from penstock.kernels.linear.hopper import ACTIVATIONS, ALIGNED_COLUMNS, CAPABILITY, FORMATS, Shape, hopper_use
from penstock.kernels.linear.product import Operands, Product
from penstock.kernels.moe.grouped import Places
from penstock.kernels.moe.mixture import Given, Mixture, refusal
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic

MIN_ASSIGNMENTS = 64
# (warp groups, rows of w), for few and for many tokens of an expert. Clusters that share w were no faster where all
# experts had many tokens, and with fewer the emptier tiles cost more than that.
SOME = ((1, 256), (1, 128), (2, 256))
MANY = ((2, 256), (2, 192), (2, 128))
MANY_EACH = 96  # tokens of an expert, on average


class Hopper(Tactic):
    """Bulk tensor copies feed warp-group products; each block walks over the tiles of all experts."""

    op = "moe"
    name = "hopper"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if device.kind == "cuda" and device.capability != CAPABILITY:
            return f"written for compute capability {CAPABILITY / 10} alone, not {device.capability / 10}"
        if why := refusal(site, sizes, device, 2):
            return why
        m = Mixture.of(site, sizes)
        formats = {str(m.inputs[n].format) for n in ("x", "w_in", "w_out")}
        if len(formats) > 1 or not formats <= set(FORMATS):
            return f"formats are {', '.join(sorted(formats))}; all are to be one of {', '.join(FORMATS)}"
        if m.width % ALIGNED_COLUMNS or m.hidden % ALIGNED_COLUMNS:
            return f"rows of {m.width} and {m.hidden}; the copy engine wants multiples of {ALIGNED_COLUMNS}"
        if "b_in" in m.inputs or m.act not in ACTIVATIONS:
            return f"biases or activation {m.act!r}, which the kernel does not know"
        few = m.assignments < MIN_ASSIGNMENTS
        return f"{m.assignments} tokens times experts; made for {MIN_ASSIGNMENTS} up" if few else None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        m = Mixture.of(site, sizes)
        shapes = MANY if m.assignments >= MANY_EACH * m.experts else SOME
        return tuple({"GROUPS": groups, "ROWS": rows} for groups, rows in shapes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        m = Mixture.of(site, sizes)
        shape = Shape(config["GROUPS"], config["ROWS"], persistent=True)
        places = Places(m, shape.tokens)
        size, count = m.x.format.bytes, places.count
        (at_h, at_x), total = gpu.layout(count * m.hidden * size, count * m.width * size)
        h = Arg("workspace", places.bytes + at_h)
        x = Arg("workspace", places.bytes + at_x)  # and, when that has been read, what each expert makes of it
        sorted_x: Given = (("sorted", gpu.pointer(m.x), x),)
        return Draft(
            (
                *places.align(device),
                places.gather(device, sorted_x),
                _product(m, places, device, shape, x, h, m.act),
                _product(m, places, device, shape, h, x, ""),
                places.combine(device, (("each", gpu.pointer(m.x), x),)),
            ),
            places.bytes + total,
        )


def _product(m: Mixture, places: Places, device: Device, shape: Shape, x: Arg, y: Arg, act: str) -> KernelUse:
    """The first product where `act` is named, else the second."""
    w, index = (m.inputs["w_in"], 3) if act else (m.inputs["w_out"], 4)
    experts, n, k = (_known(w, i) for i in range(3))
    format = m.x.format
    p = Product(places.count, n, k, format, w.format, format, None, act, gated=bool(act))
    pointer = gpu.pointer(m.x)
    given: Operands = {
        "x": (x, pointer), "w": (Arg("in", index), pointer), "y": (y, pointer),
        **{name: (arg, kind) for name, kind, arg in places.given("owners", "used")},
    }  # fmt: skip
    return hopper_use(p, device, shape, given, experts=experts)


def _known(type: Type, index: int) -> int:
    size = type.shape[index]
    assert isinstance(size, int), type
    return size
