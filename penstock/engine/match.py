"""Whether an engine is for the machine at hand."""

from __future__ import annotations

from collections.abc import Mapping

from penstock import plugins
from penstock.engine.device import Device
from penstock.engine.manifest import Engine

COMPILES_ONLY = ("triton", "nvrtc")


def mismatch(engine: Engine, device: Device, software: Mapping[str, str]) -> str | None:
    """One sentence on the first thing that differs from what the engine was compiled for; None where nothing does.

    Compared are the device's kind, capability and name, the version of each software that the engine records, and
    version and sources of each plugin whose ops, formats or calls it runs.
    Left out: memory, caches and processors, which a shared GPU may show less of; they change speed, not function; and
    where `software` lacks it or calls it absent, what only compiled the engine, since running needs none of it.
    """
    made = engine.device
    if (made.kind, made.capability, made.name) != (device.kind, device.capability, device.name):
        return f"the engine was compiled for {_called(made)}, and this is {_called(device)}"
    for name, version in engine.software.items():
        found = software.get(name, "absent")
        if found != version and not (found == "absent" and name in COMPILES_ONLY):
            return f"the engine was compiled with {name} {version}, and this is {name} {found}"
    return plugins.difference(engine.plugins)


def _called(device: Device) -> str:
    return "a CPU" if device.kind == "cpu" else f"{device.name} (sm_{device.capability})"
