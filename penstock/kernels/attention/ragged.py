"""Attention for any ragged mixture: short rows split over their keys, long rows in tiles of queries."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.attention.shape import (
    FOLDER,
    ROWS,
    Parts,
    Shape,
    Tasks,
    constants,
    extras,
    prefill,
    refusal,
    short_constants,
    triton_kernel,
    tunables,
)
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, inputs, outputs


class Ragged(Tactic):
    """Two families of kernels under one fixed grid, right for whatever rows a step of the bucket holds.

    Rows of at most `Shape.short` queries: `decode` splits the keys of all such rows into tasks of near equal size,
    sized on the device from the contexts; the last task of a row to end joins them in order. Longer rows: `prefill`,
    a tile of queries a program; where such tiles are few, their keys are split and joined likewise. Programs without
    work end at once. Sequences must stand in the step in order and without gaps, as `prepare` puts them. Tokens of no
    sequence, behind the last, become zero.
    """

    op, name, version = "attention", "ragged", 4

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tunables(site, sizes, device)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        shape = Shape.of(site)
        tasks = Tasks.of(shape, sizes, device, config)
        steps = [_decode(site, sizes, device, config, tasks)]
        if sizes["T"] <= shape.short:
            return Draft(tuple(steps), tasks.workspace, tasks.counters)
        parts = Parts.of(shape, sizes, device, config, shape.short)
        steps.append(prefill(site, sizes, device, config, shape.short, (*inputs(*range(6)), *outputs(0))))
        return Draft(tuple(steps), max(tasks.workspace, parts.workspace), max(tasks.counters, parts.counters))


def _decode(site: Site, sizes: Sizes, device: Device, config: Config, tasks: Tasks) -> KernelUse:
    shape = Shape.of(site)
    pointers, given = extras(site)
    signature = (
        ("q_ptr", shape.pointer), ("kv_ptr", shape.pool), *ROWS, ("table_ptr", "*i32"),
        ("out_ptr", shape.pointer), ("acc_ptr", "*fp32"), ("ml_ptr", "*fp32"), ("count_ptr", "*i32"), *pointers,
        ("T", "i32"), ("S", "i32"), ("M", "i32"), ("programs", "i32"), ("least", "i32"),
    )  # fmt: skip
    named = {**constants(site, sizes, device, shape.short), **short_constants(shape, config)}
    kernel = triton_kernel(f"{FOLDER}.decode_triton:decode", signature, named, config["WARPS"], config["STAGES"])
    numbers = gpu.integers(sizes["T"], sizes["S"], sizes["M"], tasks.aim, tasks.least)
    memory = (*gpu.workspace(0, tasks.partial), *gpu.zeroed(0))
    args = (*inputs(*range(6)), *outputs(0), *memory, *given, *numbers)
    return KernelUse(kernel, (tasks.most + 1, shape.kv_heads, 1), args)
