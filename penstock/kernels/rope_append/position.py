"""What the tactics of rope, kv_append and rope_append share: supported types, and how heads fall to programs."""

from __future__ import annotations

from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site
from penstock.ir.graph import Type
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, KernelUse, TritonKernel, cdiv, next_power_of_2

SOURCE = "penstock.kernels.rope_append.position_triton"
MAX_HEAD = 1024  # numbers; a head is one tile


def refusal(site: Site, floats: tuple[int, ...], head_size: int, device: Device) -> str | None:
    """Why none of the three kernels can run, or None. `floats`: the inputs in a format that they must know."""
    if why := gpu.refusal(site, device, floats, 80):
        return why
    if head_size > MAX_HEAD:
        return f"heads of {head_size} numbers; at most {MAX_HEAD}"
    return None


def configs(heads: int, head_size: int, tokens: int) -> tuple[Config, ...]:
    """HB: heads of a program. Few tokens: many small programs; many tokens: fewer and larger ones."""
    room = max(1, 4096 // next_power_of_2(head_size))
    sizes = [min(hb, room, next_power_of_2(heads)) for hb in ((4, 2, 8, 16) if tokens <= 64 else (16, 8, 32, 4))]
    return tuple({"HB": hb, "WARPS": _warps(hb * head_size)} for hb in dict.fromkeys(sizes))


def _warps(numbers: int) -> int:
    return 1 if numbers <= 256 else 2 if numbers <= 512 else 4


def use(
    function: str, signature: tuple[tuple[str, str], ...], constants: dict[str, Any], args: tuple[Arg, ...],
    tokens: int, heads: int, device: Device, config: Config,
) -> KernelUse:  # fmt: skip
    """A launch over tokens and groups of HB heads."""
    named = (*constants.items(), ("HB", config["HB"]), gpu.pdl(device))
    kernel = TritonKernel(f"{SOURCE}:{function}", signature, named, config["WARPS"])
    return KernelUse(kernel, (tokens, cdiv(heads, config["HB"] * config.get("TURNS", 1)), 1), args)


def rotation(site: Site, freqs: Type, scale: str = "scale") -> dict[str, Any]:
    """The constants of a site's rotation by frequencies of that type; `scale`: the attribute that has its factor."""
    pairs = bool(site.attr("interleaved", False))
    factor = float(site.attr(scale, 1.0))
    return {"HALF": freqs.shape[1], "PAIRS": pairs, "BY_ROW": freqs.shape[0] != 1, "SCALE": factor}


def head(size: int) -> dict[str, Any]:
    """The constants of a head of that many numbers."""
    return {"D": size, "DP": next_power_of_2(size)}
