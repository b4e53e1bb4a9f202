"""A tile of queries a program, over all pages that one of them sees."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels.encoder_attention import whole
from penstock.kernels.tactic import Config, Draft, Tactic


class Whole(Tactic):
    """As for an encoder's own attention; the heads of a group each read its keys."""

    op, name = "prefix_attention", "whole"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return whole.refusal(site, sizes, device, (0, 1))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return whole.configs(site, sizes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        rows = {"query_start_ptr": 2, "query_len_ptr": 3, "context_len_ptr": 4, "prefix_len_ptr": 5, "table_ptr": 6}
        return whole.draft_over_cache("over_prefix", rows, site, sizes, device, config)
