"""rope_append and attention at once: one launch for a step of single tokens, a second where rows may be long."""

from __future__ import annotations

from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.attention.shape import (
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
from penstock.kernels.rope_append import position
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, cdiv, inputs, next_power_of_2, outputs

SOURCE = "penstock.kernels.rope_attention.step_triton:step"
MOST_TOKENS = 1024  # of a step; beyond it one launch more or less was within the noise
LOOKED_AT = 8  # tokens that one program looks through for padding and long rows


class Step(Tactic):
    """Short rows rotate, append and attend in one program each; long rows are rotated beside them and attended behind.

    Positions of short rows are taken from their contexts, which is where `prepare` has them from.
    """

    op, name, version = "rope_attention", "step", 3

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if sizes["T"] > MOST_TOKENS:
            return f"{sizes['T']} tokens; at most {MOST_TOKENS}"
        return refusal(site, sizes, device) or gpu.refusal(site, device, tuple(range(9, len(site.inputs))), 80)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tunables(site, sizes, device)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        shape = Shape.of(site)
        tasks = Tasks.of(shape, sizes, device, config)
        parts = Parts.of(shape, sizes, device, config, _short_row(shape, sizes))
        queries = cdiv(max(tasks.workspace, parts.workspace), 256) * 256  # where long rows' rotated queries lie
        steps = [_short(site, sizes, device, config, tasks, queries)]
        if sizes["T"] <= _short_row(shape, sizes):
            return Draft(tuple(steps), tasks.workspace, tasks.counters)
        args = (*gpu.workspace(queries), *inputs(1, 6, 7, 8, 5), *outputs(0))
        steps.append(prefill(site, sizes, device, config, _short_row(shape, sizes), args))
        size = sizes["T"] * shape.heads * shape.head_size * shape.bytes
        return Draft(tuple(steps), queries + size, max(tasks.counters, parts.counters))


def _short_row(shape: Shape, sizes: Sizes) -> int:
    """Queries of a row that is split over its keys. One, where long rows need a launch anyway: fewer registers."""
    return shape.short if sizes["T"] <= shape.short else 1


def _short(site: Site, sizes: Sizes, device: Device, config: Config, tasks: Tasks, queries: int) -> KernelUse:
    shape = Shape.of(site)
    has_long = sizes["T"] > _short_row(shape, sizes)
    pointers, given = extras(site)
    q_norm, k_norm = (9, 10) if _normal(site) else (0, 0)  # not read where there are none
    arrays: tuple[tuple[str, str, Arg], ...] = (
        ("qkv_ptr", shape.pointer, Arg("in", 0)), ("kv_ptr", shape.pool, Arg("in", 1)),
        ("positions_ptr", "*i32", Arg("in", 2)), ("freqs_ptr", "*fp32", Arg("in", 3)),
        ("rows_ptr", "*i32", Arg("in", 4)), ("table_ptr", "*i32", Arg("in", 5)),
        *((name, kind, Arg("in", 6 + i)) for i, (name, kind) in enumerate(ROWS)),
        ("q_norm_ptr", gpu.pointer(site.inputs[q_norm]), Arg("in", q_norm)),
        ("k_norm_ptr", gpu.pointer(site.inputs[k_norm]), Arg("in", k_norm)),
        ("out_ptr", shape.pointer, Arg("out", 0)),
        ("q_out_ptr", shape.pointer, Arg("workspace", queries) if has_long else Arg("out", 0)),
        ("acc_ptr", "*fp32", Arg("workspace", 0)), ("ml_ptr", "*fp32", Arg("workspace", tasks.partial)),
        ("count_ptr", "*i32", Arg("zeroed", 0)),
        *((name, kind, arg) for (name, kind), arg in zip(pointers, given, strict=True)),
    )  # fmt: skip
    numbers = {
        **{name: sizes[name] for name in "TSM"},
        "programs": tasks.aim,
        "least": tasks.least,
    }
    signature = (*((name, kind) for name, kind, _ in arrays), *((name, "i32") for name in numbers))
    args = (*(arg for _, _, arg in arrays), *gpu.integers(*numbers.values()))
    kernel = triton_kernel(SOURCE, signature, _named(site, sizes, device, config), config["WARPS"], config["STAGES"])
    return KernelUse(kernel, (tasks.most + cdiv(sizes["T"], LOOKED_AT), shape.kv_heads, 1), args)


def _normal(site: Site) -> bool:
    """Whether queries and keys are normalised by head."""
    return len(site.inputs) - len(site.attr("extras", ())) > 9


def _named(site: Site, sizes: Sizes, device: Device, config: Config) -> dict[str, Any]:
    shape = Shape.of(site)
    rotation = position.rotation(site, site.inputs[3], "factor")
    return {
        **constants(site, sizes, device, _short_row(shape, sizes)),
        **short_constants(shape, config),
        "QP": min(_short_row(shape, sizes), next_power_of_2(sizes["T"])),
        "TT": LOOKED_AT,
        "FACTOR": rotation.pop("SCALE"),
        **rotation,
        "NORM": _normal(site),
        "EPS": float(site.attr("eps", 0.0)),
        "OFFSET": float(site.attr("offset", 0.0)),
    }
