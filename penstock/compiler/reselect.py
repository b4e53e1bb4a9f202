"""An engine for another device or other software: planned anew from its own manifest, without its checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from penstock.compiler.backend import Planned, Unplanned, plan_engine
from penstock.compiler.build import copy_kernels
from penstock.compiler.candidates import Pins
from penstock.compiler.identity import compiler_facts, digest
from penstock.compiler.progress import Progress, counting, silent
from penstock.compiler.timing_cache import cache_root
from penstock.compiler.weights import write_weights
from penstock.engine import store
from penstock.engine.device import Device
from penstock.engine.manifest import Engine, Weight
from penstock.engine.program import DECODE, ENCODE
from penstock.ir.graph import Graph, leaf
from penstock.kernels.layouts import unpack
from penstock.models.checkpoint import Checkpoint, read_header

_REWRITTEN = (store.MANIFEST, store.FILES, store.TIMING, store.weights_file())


@dataclass(frozen=True)
class StoredWeights(Checkpoint):
    """An engine's own weights as the tensors of a checkpoint: by name, and unpacked."""

    weights: Mapping[str, Weight] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Engine, directory: Path) -> StoredWeights:
        file = directory / store.weights_file()
        return cls(directory, dict(read_header(file)), weights=engine.weights)

    def read(self, name: str, format: str | None = None) -> Any:
        weight = self.weights[name]
        return unpack(weight.layout, super().read(name, format)).reshape(weight.type.concrete({}))


def reselect(
    engine_dir: Path, device: Device, cache_dir: Path | None = None, pins: Pins | None = None,
    progress: Progress = silent, output: Path | None = None,
) -> Path:  # fmt: skip
    """The engine with its tactics chosen again for `device` and the software at hand. Returns its directory.

    It goes into the cache, where a second call finds it, or into `output` (which may be engine_dir itself). Weights
    whose layout changes are unpacked and packed anew. Raises SelectionError where no tactic runs an op, ResourceError
    when the disk is full; the old engine stays as it was.
    """
    engine, root = store.load(engine_dir), cache_root(cache_dir)
    key = _key(engine, device, pins or {})
    target = output or root / "engines" / f"{engine_dir.resolve().name}-{key}"
    if store.holds(target, key):
        progress("cached", 1, 1)
        return target
    draft = _unplanned(engine, {"key": key, "tactics": dict(pins or {})})
    planned = plan_engine(draft, device, root, pins or {}, progress)
    with store.writing(target, ours=output is None) as part:
        _write(replace(planned, seconds=engine.build_seconds), engine, engine_dir, part, progress)
    return target


def _unplanned(engine: Engine, source: Mapping[str, Any]) -> Unplanned:
    """What the manifest says that does not depend on the device."""
    graphs = {name: {n: phase.graph for n, phase in p.phases.items()} for name, p in engine.programs.items()}
    expressions = {name: weight.expression for name, weight in engine.weights.items()}
    kept = {k: v for k, v in engine.source.items() if k != "base"}  # what is refitted from here on is this engine
    return Unplanned(
        engine.spec, engine.profile, engine.format, graphs[DECODE], expressions, {**kept, **source},
        engine.tokens, engine.work, engine.report, _family(engine), graphs.get(ENCODE, {}),
    )  # fmt: skip


def _family(engine: Engine) -> str:
    """That of a plugin, by the record; the name of one of ours is of no more use."""
    return next((name for entry in engine.plugins.values() for name in entry["parts"].get("family", ())), "")


def _key(engine: Engine, device: Device, pins: Pins) -> str:
    """Identity: the engine's own key and graphs, its limits, the pins, device and compiler. Never a build's key."""
    phases = ((name, n, p) for name, program in engine.programs.items() for n, p in program.phases.items())
    graphs = {f"{program}.{name}": phase.graph.key() for program, name, phase in phases}
    facts = [engine.source.get("key"), graphs, engine.profile.to_json(), dict(pins), compiler_facts(device)]
    return f"reselect-{digest(facts)}"


def _write(planned: Planned, old: Engine, source: Path, part: Path, progress: Progress) -> None:
    _weights(planned.engine, old, source, part, progress)
    copy_kernels(planned, part / store.KERNELS)
    (part / store.TIMING).write_text(json.dumps(planned.timing, indent=1))
    store.copy((p for p in source.rglob("*") if p.is_file() and not _made_anew(p, source)), source, part)
    store.save(replace(planned.engine, build_seconds=planned.seconds), part)


def _made_anew(file: Path, source: Path) -> bool:
    place = file.relative_to(source)
    return place.parts[0] == store.KERNELS or str(place) in _REWRITTEN


def _weights(new: Engine, old: Engine, source: Path, part: Path, progress: Progress) -> None:
    """The file as it is where no layout changed; otherwise each weight through its plain form."""
    name = store.weights_file()
    if all(new.weights[n].layout == weight.layout for n, weight in old.weights.items()):
        shutil.copyfile(source / name, part / name)
        return
    written = counting("weights", new.weight_bytes, progress)
    moved = {n: replace(w, expression=_itself(n, w)) for n, w in new.weights.items()}
    write_weights(moved, StoredWeights.of(old, source), part / name, "cpu", written)


def _itself(name: str, weight: Weight) -> Graph:
    return Graph((leaf("tensor", name, weight.type),), ("weight",))
