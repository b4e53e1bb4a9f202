"""What tactics for a CUDA device have in common: who may run, and how types are spelled in a kernel's signature."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.ir.graph import Type

FLOATS = ("f32", "f16", "bf16")
POOLS = (*FLOATS, "fp8_e4m3")  # what the cache may be kept in
FP8 = 90  # capability from which on the compiler converts it
NO_DEVICE = "needs a CUDA device"


def refusal(site: Site, device: Device, floats: tuple[int, ...] = (), capability: int = 0) -> str | None:
    """Why kernels cannot run at all: no CUDA device, or one of less than `capability` (80 for 8.0), or an input of
    `floats` in a format they, or the device, do not read."""
    if device.kind != "cuda" or device.capability < capability:
        return f"needs a CUDA device of compute capability {capability / 10} or above" if capability else NO_DEVICE
    for i in floats:
        name, known = site.inputs[i].format.name, POOLS if "N" in site.inputs[i].symbols else FLOATS
        if name not in known:
            return f"input {i} is {name}; supported are {', '.join(known)}"
        if name not in FLOATS and device.capability < FP8:
            return f"input {i} is {name}; compute capability {FP8 / 10} or above reads it"
    return None


def pointer(type: Type) -> str:
    """A pointer to the type's elements, as Triton spells it."""
    return f"*{type.format.triton_dtype}"


def width(type: Type) -> int:
    """The last dimension."""
    last = type.shape[-1]
    assert isinstance(last, int), f"{type} has rows of a run-time size"
    return last


def rows(type: Type, sizes: Sizes) -> int:
    """How many rows of the last dimension the tensor has in this bucket."""
    count = 1
    for d in type.concrete(sizes)[:-1]:
        count *= d
    return count


def pdl(device: Device) -> tuple[str, bool]:
    """The constant PDL: whether kernels wait for what they depend on by themselves (compute capability 9.0 and up)."""
    return ("PDL", device.capability >= 90)


def integers(*values: int) -> tuple[Arg, ...]:
    return tuple(Arg("int", v) for v in values)


def workspace(*offsets: int) -> tuple[Arg, ...]:
    return tuple(Arg("workspace", o) for o in offsets)


def zeroed(*offsets: int) -> tuple[Arg, ...]:
    return tuple(Arg("zeroed", o) for o in offsets)


def layout(*sizes: int) -> tuple[tuple[int, ...], int]:
    """Byte offsets of regions of `sizes` bytes, each aligned to 256, and their total."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // 256) * 256
    return tuple(offsets), total
