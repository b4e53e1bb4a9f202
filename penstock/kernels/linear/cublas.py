"""The vendor's product, through torch."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, Draft, Tactic, whole_call


class Cublas(Tactic):
    """One library call for the whole site, bias and output format included."""

    op = "linear"
    name = "cublas"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := gpu.refusal(site, device, tuple(range(len(site.inputs)))):
            return why
        x, w, *bias = (t.format.name for t in site.inputs)
        out = site.outputs[0].format.name
        if len(site.inputs[0].shape) != 2 or w != x or (bias and bias[0] != x):
            return f"the library takes matrices of one format, not {', '.join(map(str, site.inputs))}"
        if out not in (x, "f32"):
            return f"the library gives {x} or f32, not {out}"
        return None

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        return Draft((whole_call("cublas", site),))
