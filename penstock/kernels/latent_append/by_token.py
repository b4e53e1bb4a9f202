"""The append of keys and latents, a program for each token."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, inputs, next_power_of_2

SOURCE = "penstock.kernels.latent_append.by_token_triton:latent_append"
MAX_WIDTH = 8192  # numbers of a token; they are one tile


class ByToken(Tactic):
    op, name = "latent_append", "by_token"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if gpu.width(site.inputs[0]) > MAX_WIDTH:
            return f"{gpu.width(site.inputs[0])} numbers of a token; at most {MAX_WIDTH}"
        return gpu.refusal(site, device, (0, 1, 2))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return ({"warps": 1}, {"warps": 2}, {"warps": 4})

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        kv, key, latent = site.inputs[:3]
        signature = (
            ("kv_ptr", gpu.pointer(kv)), ("key_ptr", gpu.pointer(key)), ("latent_ptr", gpu.pointer(latent)),
            ("positions_ptr", "*i32"), ("rows_ptr", "*i32"), ("table_ptr", "*i32"), ("M", "i32"),
        )  # fmt: skip
        widths = gpu.width(key), gpu.width(latent)
        constants = (
            ("R", widths[0]), ("C", widths[1]), ("WP", next_power_of_2(sum(widths))), ("B", int(kv.shape[3])),
            gpu.pdl(device),
        )  # fmt: skip
        kernel = TritonKernel(SOURCE, signature, constants, config["warps"])
        return Draft((KernelUse(kernel, (sizes["T"], 1, 1), (*inputs(*range(6)), *gpu.integers(sizes["M"]))),))
