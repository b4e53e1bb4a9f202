"""Writing the step's results back into the slots: one program holds all rows."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.prepare.step import SOURCE, slot_layout, unfit
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, inputs, next_power_of_2


class StepCommit(Tactic):
    """Reads the upload as `prepare` does; nothing but the slots is written."""

    op = "commit"
    name = "step"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return unfit(site, sizes, device)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        layout = slot_layout(site)
        kernel = TritonKernel(
            f"{SOURCE}:commit",
            (("slots", "*i32"), ("upload", "*i32"), ("sampled", "*i32")),
            (
                *(("SLOTS", layout.num_slots), ("HISTORY", layout.history), ("HISTORY_AT", layout.history_at)),
                ("BLOCK_S", max(16, next_power_of_2(sizes["S"]))),
                gpu.pdl(device),
            ),
        )
        return Draft((KernelUse(kernel, (1, 1, 1), inputs(0, 1, 2)),))
