"""What `penstock check` says of an engine directory: is it for this machine, and is there room. From its manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.cli.console import amount
from penstock.compiler.options import FORMATS, BuildOptions
from penstock.engine import store
from penstock.engine.device import Device
from penstock.engine.manifest import Engine
from penstock.engine.match import mismatch
from penstock.engine.memory import CONTEXT, least_budget, plan_run, request_bytes
from penstock.errors import OptionError
from penstock.kernels.device import software

Data = dict[str, Any]
LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len")


def report(directory: Path, options: BuildOptions, device: Device, budget: int, named: bool) -> Data:
    """Facts and verdict; `fits`: as it is, on this device, within the budget. No torch.

    `named`: the device was named to plan for, so the software at hand is not what will run it and is not compared.
    Raises EngineError for a damaged engine, OptionError for a type or limits that it was not built for.
    """
    engine = store.load(directory)
    _check_given(engine, directory, options)
    reason = mismatch(engine, device, engine.software if named else software(device))
    memory = _memory(engine, budget) if engine.device.kind == "cpu" else _planned(engine, budget, options)
    return {
        "engine": str(directory),
        "format": engine.format,
        "kv_format": engine.kv_format,
        "made_for": {"device": engine.device.name, **engine.software},
        "device": device.name,
        "mismatch": reason,
        "profile": engine.profile.to_json(),
        "memory": memory,
        "fits": reason is None and memory["needed"] <= budget,
        "verdict": _verdict(engine, reason, memory),
    }


def _check_given(engine: Engine, directory: Path, options: BuildOptions) -> None:
    if options.dtype != "auto" and FORMATS.get(options.dtype) != engine.format:
        raise OptionError(f"--dtype {options.dtype}, but the engine computes in {engine.format}; leave it out")
    options.check_kv(engine, str(directory))
    for name in LIMITS:
        asked, built = getattr(options, name), getattr(engine.profile, name)
        if asked is not None and not 1 <= asked <= built:
            raise OptionError(f"--{name} {asked} is outside 1 to {built}, which the engine was built for")


def _memory(engine: Engine, budget: int) -> Data:
    """Bytes. `needed`: weights, arena, slots, one request of full length and the block that padding writes to."""
    profile, block = engine.profile, engine.block_bytes
    buffers = engine.arena + 4 * (profile.slots.size + profile.upload_size)
    fixed, request = engine.weight_bytes + buffers, request_bytes(engine, profile)
    return {
        "weights": engine.weight_bytes,
        "buffers": buffers,
        "driver": 0,
        "kv_per_token": block / profile.block_size,
        "kv_per_request": request,
        "needed": fixed + request + block,
        "at_limits": fixed + request * profile.max_batch_size,
        "budget": budget,
    }


def _planned(engine: Engine, budget: int, options: BuildOptions) -> Data:
    """The same of a GPU's engine, by the plan that a run prints before it loads; `plan` is that plan, where it fits."""
    given = {name: value for name in LIMITS if (value := getattr(options, name)) is not None}
    limits = replace(engine.profile, **given)
    least, request = least_budget(engine, limits), request_bytes(engine, limits)
    own = budget - CONTEXT
    plan = plan_run(engine, max(own, least), limits)
    return {
        "weights": plan.weights,
        "buffers": plan.arena + plan.slots,
        "driver": CONTEXT + plan.workspace + plan.graphs,
        "kv_per_token": engine.block_bytes / limits.block_size,
        "kv_per_request": request,
        "least": least,
        "needed": CONTEXT + least,
        "at_limits": CONTEXT + least + request * (limits.max_batch_size - 1),
        "budget": budget,
        **({"plan": plan.facts()} if least <= own else {}),
    }


def _verdict(engine: Engine, reason: str | None, memory: Data) -> str:
    left = memory["budget"] - memory["needed"]
    if left < 0:
        return f"does not fit: {amount(-left)} more are needed; lower the limits of the run, or of the build"
    if reason is not None:
        return (
            f"not for this machine: {reason}; there is room for it: `penstock generate ENGINE` selects its tactics "
            f"anew, or build again from its checkpoint"
        )
    return f"fits: the engine was made for this device and software, up to {engine.profile.max_batch_size} requests"
