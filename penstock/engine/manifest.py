"""The engine: what `build` writes and the runtime reads. A person can read engine.json; another runtime can run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.engine.device import Device
from penstock.engine.groups import StateGroup, groups_of
from penstock.engine.profile import Profile
from penstock.engine.program import ENCODE, Program, program_from_json, program_to_json
from penstock.engine.sound import flaws
from penstock.errors import EngineCorruptError, EngineSchemaError, ModelError, PluginError
from penstock.ir.graph import Graph, Node, Type
from penstock.ir.text import graph_from_json, graph_to_json, parse_type
from penstock.spec import ModelSpec

SCHEMA = 6


@dataclass(frozen=True)
class Weight:
    """One weight: its type as the graph sees it, how it is laid out, and the expression it comes from."""

    type: Type
    layout: str
    expression: Graph


@dataclass(frozen=True)
class Engine:
    """The manifest.

    `spec`: the model, as ModelSpec prints itself. `source`: where the weights came from. `device`, `software`: what the
    engine was compiled for. `buffers[bucket]`: byte offsets in the arena of every value of every phase, in graph order
    (-1: aliases an input); `arena`: its bytes. `tokens`: eos ids and sampling defaults of the model. `work`: bytes and
    operations of one token, for the roof. `report`: what the passes did. `roof`: the device's own rates, as the
    build measured them (read_bytes_per_s, flops_per_s); empty on a CPU. `plugins`: by module, of those that have a part
    in it: version, a hash of their sources, and their parts by kind.
    """

    spec: Mapping[str, Any]
    profile: Profile
    format: str
    device: Device
    software: Mapping[str, str]
    source: Mapping[str, Any]
    programs: Mapping[str, Program]
    weights: Mapping[str, Weight]
    buffers: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    arena: int = 0
    kernels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: Mapping[str, Any] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)
    report: tuple[Mapping[str, Any], ...] = ()
    build_seconds: Mapping[str, float] = field(default_factory=dict)
    roof: Mapping[str, float] = field(default_factory=dict)
    plugins: plugins.Record = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)  # where it was read from; not written

    @cached_property
    def model_spec(self) -> ModelSpec:
        """`spec` as records."""
        return ModelSpec.from_json(dict(self.spec))

    @cached_property
    def states(self) -> tuple[Node, ...]:
        """The states of the decode program's layers, in layer order."""
        graph = self.programs["decode"].phases["forward"].graph
        return graph.leaves("state")

    @cached_property
    def groups(self) -> tuple[StateGroup, ...]:
        """Those that keep blocks, in the order of their block tables."""
        return tuple(group for group in groups_of(self.states) if not group.by_slot)

    @cached_property
    def by_slot(self) -> tuple[StateGroup, ...]:
        """Those whose states have a place for each slot."""
        return tuple(group for group in groups_of(self.states) if group.by_slot)

    @property
    def encoder(self) -> Program | None:
        """The program of an encoder's runs, where the model has one."""
        return self.programs.get(ENCODE)

    @property
    def zeroed(self) -> int:
        """Bytes that are zero whenever a plan of any program starts."""
        return max(program.zeroed for program in self.programs.values())

    @property
    def besides(self) -> str:
        """The group of states, if there is one, for which KV of a text's beginning alone is of no use."""
        return next((g.name for g in (*self.by_slot, *self.groups) if g.by_slot or g.fixed or g.whole), "")

    @property
    def reads_prefix(self) -> bool:
        """Whether a prompt's first tokens see each other; which those are, `tokens` say."""
        return any(group.whole for group in self.groups)

    @property
    def kv_format(self) -> str:
        """What KV is kept in: the format that the engine computes in, or a narrower one."""
        return next((node.types[0].format.name for group in self.groups for node in group.states), self.format)

    @property
    def formats(self) -> str:
        """For people and records: what it computes in, and what KV is kept in where that is another."""
        return self.format if self.kv_format == self.format else f"{self.format}, KV {self.kv_format}"

    @property
    def block_bytes(self) -> int:
        """Bytes that one block of each group takes over all layers."""
        return sum(group.unit_bytes for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(w.type.nbytes() for w in self.weights.values())

    def step_bytes(self, tokens: int = 1) -> float:
        """Bytes of weights that a step reads: of experts those that its tokens meet, where all are equally likely."""
        met = 1 - (1 - self.work.get("expert_share", 0.0)) ** tokens
        return float(self.work["weight_bytes"] + self.work.get("expert_bytes", 0.0) * met)

    @property
    def vocab_size(self) -> int:
        return int(self.spec["vocab_size"])


def to_json(engine: Engine) -> dict[str, Any]:
    """The manifest as stored; `checksum` is over everything else."""
    data = {
        "schema": SCHEMA,
        "spec": dict(engine.spec),
        "profile": engine.profile.to_json(),
        "format": engine.format,
        "device": asdict(engine.device),
        "software": dict(engine.software),
        "source": dict(engine.source),
        "programs": {name: program_to_json(p) for name, p in engine.programs.items()},
        "weights": {name: _weight_to_json(w) for name, w in engine.weights.items()},
        "buffers": {b: {p: list(o) for p, o in phases.items()} for b, phases in engine.buffers.items()},
        "arena": engine.arena,
        "kernels": {key: dict(facts) for key, facts in engine.kernels.items()},
        "tokens": dict(engine.tokens),
        "work": dict(engine.work),
        "report": [dict(r) for r in engine.report],
        "build_seconds": dict(engine.build_seconds),
        "roof": dict(engine.roof),
        "plugins": dict(engine.plugins),
    }
    return {**data, "checksum": checksum(data)}


def from_json(data: Mapping[str, Any]) -> Engine:
    """Raises EngineSchemaError for another schema, PluginError where a plugin that it needs is not loaded,
    EngineCorruptError where the checksum does not match, or where a field is missing or holds what no build writes."""
    if data.get("schema") != SCHEMA:
        raise EngineSchemaError(
            f"the engine has schema {data.get('schema')!r}, this version reads {SCHEMA}; "
            "build it again from its checkpoint"
        )
    rest = {k: v for k, v in data.items() if k != "checksum"}
    if data.get("checksum") != checksum(rest):
        raise EngineCorruptError(
            "engine.json was changed after it was written (checksum differs); build the engine again"
        )
    try:
        plugins.require(data["plugins"])
        engine = _engine(data)
        flaw = next(flaws(engine), None)
    except PluginError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, ModelError) as error:
        raise EngineCorruptError(f"engine.json lacks or mistakes {error}; build the engine again") from None
    if flaw is not None:
        raise EngineCorruptError(f"engine.json is wrong about {flaw}; build the engine again")
    return engine


def _engine(data: Mapping[str, Any]) -> Engine:
    return Engine(
        spec=data["spec"],
        profile=Profile(**data["profile"]),
        format=data["format"],
        device=Device(**data["device"]),
        software=data["software"],
        source=data["source"],
        programs={name: program_from_json(p) for name, p in data["programs"].items()},
        weights={name: _weight_from_json(w) for name, w in data["weights"].items()},
        buffers={b: {p: tuple(o) for p, o in phases.items()} for b, phases in data["buffers"].items()},
        arena=data["arena"],
        kernels=data["kernels"],
        tokens=data["tokens"],
        work=data["work"],
        report=tuple(data["report"]),
        build_seconds=data["build_seconds"],
        roof=data["roof"],
        plugins=data["plugins"],
    )


def checksum(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def _weight_to_json(weight: Weight) -> dict[str, Any]:
    return {"type": str(weight.type), "layout": weight.layout, "expression": graph_to_json(weight.expression)}


def _weight_from_json(data: Mapping[str, Any]) -> Weight:
    return Weight(parse_type(data["type"]), data["layout"], graph_from_json(data["expression"]))
