"""What may run a site: every tactic that supports it, each configuration drafted at the sizes asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from penstock.engine.device import Device
from penstock.engine.program import Call, Site, Sizes
from penstock.errors import PinError, PluginError
from penstock.ir.op import vocabulary
from penstock.kernels.reference import Reference, has_parts, plan_parts
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import NO_CONFIG, PARTS, PLAIN, REFERENCE, Config, Draft, KernelUse, Tactic
from penstock.plugins import border

Pins = Mapping[str, str]  # op -> the one tactic that may run it, or `!name` for the one that may not


def permits(pins: Pins, op: str, name: str) -> bool:
    """Whether the pins let a tactic compete for an op."""
    pin = pins.get(op, name)
    return pin[1:] != name if pin.startswith("!") else pin == name


@dataclass(frozen=True)
class Candidate:
    """A tactic with one configuration. `name` is how timings, plans and people call it."""

    tactic: Tactic | None  # None: parts
    config: Config

    @property
    def tactic_name(self) -> str:
        return self.tactic.name if self.tactic else PARTS

    @property
    def version(self) -> int:
        return self.tactic.version if self.tactic else 1

    @property
    def name(self) -> str:
        return f"{self.tactic_name}{json.dumps(dict(self.config))}" if self.config else self.tactic_name

    def key(self, op: str) -> str:
        """OP=NAME, as a pin names it."""
        return f"{op}={self.tactic_name}"

    def layouts(self, site: Site) -> tuple[tuple[int, str], ...]:
        """The layout of each weight input; parts read plain weights."""
        with border(("tactic", self.key(site.op))):
            wanted = self.tactic.layouts(site, self.config) if self.tactic else {}
            return tuple((i, wanted.get(i, PLAIN)) for i in site.weights)

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        with border(("tactic", self.key(site.op))):
            return self.tactic.supports(site, sizes, device) if self.tactic else None

    def draft(self, site: Site, sizes: Sizes, device: Device, choose: Callable[[Site], Draft]) -> Draft:
        """`choose` drafts the parts of a fused site."""
        if self.tactic is None:
            return plan_parts(site, sizes, choose)
        with border(("tactic", self.key(site.op))):
            found = self.tactic.plan(site, sizes, device, self.config)
            if not isinstance(found, Draft) or not all(isinstance(x, Call | KernelUse) for x in found.steps or (None,)):
                raise TypeError(f"a plan of {found!r}, not a Draft of calls and kernels")
        return found


def check_pins(pins: Pins) -> None:
    """Raises PinError for a pin of an op that no graph could hold, or of a tactic that the op does not have."""
    known = [op.name for op in vocabulary() if not op.weight]
    for op, name in pins.items():
        if op not in known:
            raise PinError(f"tactic {name!r} is pinned for unknown op {op!r}; known are {', '.join(known)}")
        if not isinstance(name, str):
            raise PinError(f"the pin of op {op!r} is {name!r}, a {type(name).__name__}; give a tactic's name")
        _allowed(op, pins)


def candidates(site: Site, sizes: Sizes, device: Device, pins: Pins) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """Those that can run the site at these sizes, and why the others cannot.

    The reference competes on a CPU; on a GPU it is kept for sites that nothing else can run. Raises PinError where
    a pinned tactic does not exist or cannot run the site.
    """
    refused: dict[str, str] = {}
    found: list[Candidate] = []
    for tactic in _allowed(site.op, pins):
        try:
            with border(("tactic", f"{site.op}={tactic.name}")):
                if reason := tactic.supports(site, sizes, device):
                    refused[tactic.name] = str(reason)
                else:
                    found.extend([Candidate(tactic, c) for c in tactic.tunables(site, sizes, device) or (NO_CONFIG,)])
        except PluginError as error:  # as a crash in a worker process: it is out, and on record
            refused[tactic.name] = str(error)
    if has_parts(site.op) and permits(pins, site.op, PARTS):
        found.append(Candidate(None, NO_CONFIG))
    if device.kind == "cpu" or not found or pins.get(site.op) == REFERENCE:
        found.extend(_reference(site, sizes, device, pins, refused))
    if not found and (reason := refused.get(pins.get(site.op, ""))):
        raise PinError(
            f"tactic {pins[site.op]!r}, pinned for op {site.op!r}, cannot run {site.key} on {device.name}: {reason}; "
            f"pin another, or leave the choice to timing"
        )
    return tuple(found), refused


def _reference(site: Site, sizes: Sizes, device: Device, pins: Pins, refused: dict[str, str]) -> Iterator[Candidate]:
    if not permits(pins, site.op, REFERENCE):
        return
    reference = Reference(site.op)
    if reason := reference.supports(site, sizes, device):
        refused[REFERENCE] = reason
    else:
        yield Candidate(reference, NO_CONFIG)


def _allowed(op: str, pins: Pins) -> tuple[Tactic, ...]:
    every = tactics(op)
    known = {REFERENCE, PARTS} | {t.name for t in every}
    if op in pins and pins[op].removeprefix("!") not in known:
        named = pins[op].removeprefix("!")
        raise PinError(f"no tactic {named!r} for op {op!r}; it has {', '.join(sorted(known))}")
    return tuple(t for t in every if permits(pins, op, t.name))
