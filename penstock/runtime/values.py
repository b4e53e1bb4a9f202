"""Values of an engine by name, as graph.txt prints them, and what a step leaves in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from penstock.engine.manifest import Engine
from penstock.engine.program import CONTROLLED_TAIL, FRONT, TAIL, Phase
from penstock.errors import OptionError
from penstock.ir.graph import Node, Value
from penstock.ir.op import get
from penstock.runtime.step import Backend

NEAR = 5  # names shown beside one that nothing has


@dataclass(frozen=True, slots=True)
class Name:
    """What a value is called: `%12`, or `%12.1` for a node's second result; its op; and any names it goes by outside.

    `state`: it replaces memory that lasts between steps, so it is as large as that.
    """

    phase: str
    number: str
    op: str
    results: tuple[str, ...]
    state: bool

    @property
    def full(self) -> str:
        return f"{self.phase}/{self.number}"

    @property
    def short(self) -> tuple[str, ...]:
        return (self.number, self.op, *self.results)

    def matches(self, pattern: str) -> bool:
        """Whether a pattern (`*`, `?` and `[...]` as in a shell) is about it, with or without `phase/` before it.

        A state is meant only where its own number stands there.
        """
        if self.state:
            return pattern in (self.number, self.full)
        return self.is_called(pattern)

    def is_called(self, pattern: str) -> bool:
        """As `matches`, a state too."""
        spelled = (text for short in self.short for text in (short, f"{self.phase}/{short}"))
        return any(fnmatchcase(text, pattern) for text in spelled)


def names_of(engine: Engine) -> dict[tuple[str, Value], Name]:
    """Every value that a step computes."""
    found: dict[tuple[str, Value], Name] = {}
    for phase_name, phase in engine.programs["decode"].phases.items():
        for index, node in enumerate(phase.graph.nodes):
            if not node.is_leaf:
                found |= {(phase_name, v): _name(phase_name, phase, index, v) for v in node.outputs}
    return found


def _name(phase_name: str, phase: Phase, index: int, value: Value) -> Name:
    number = f"%{index}" + (f".{value.index}" if value.index else "")
    results = tuple(n for n, v in zip(phase.graph.names, phase.graph.outputs, strict=True) if v == value)
    state = value.index in (get(value.node.op).writes or {}).values()
    return Name(phase_name, number, value.node.op, results, state)


def chosen(engine: Engine, patterns: Sequence[str]) -> dict[tuple[str, Value], Name]:
    """The values that any pattern is about. Raises OptionError for a pattern about none, naming the nearest."""
    names = names_of(engine)
    found: dict[tuple[str, Value], Name] = {}
    for pattern in patterns:
        matched = {key: name for key, name in names.items() if name.matches(pattern)}
        if not matched:
            raise OptionError(_unknown(engine, pattern, list(names.values())))
        found |= matched
    return {key: names[key] for key in names if key in found}


def _unknown(engine: Engine, pattern: str, names: Sequence[Name]) -> str:
    """Why a pattern is about nothing, and what to give instead: never the pattern itself."""
    if told := [*_leaves(engine, pattern, names)]:
        return "; ".join(dict.fromkeys(told))
    if states := [name.full for name in names if name.is_called(pattern)]:
        return f"{pattern!r} is as large as the pool or the slots, and is watched by number alone: {', '.join(states)}"
    known = dict.fromkeys(text for n in names for text in ((n.number, n.full) if n.state else (*n.short, n.full)))
    near = difflib.get_close_matches(pattern, list(known), NEAR, cutoff=0.3) or list(known)[:NEAR]
    return (
        f"no value of the engine is called {pattern!r}; near are {', '.join(near)}. `penstock inspect ENGINE --graph` "
        f"lists all; a pattern may hold * and ?, and a phase before it: {names[0].full}"
    )


def _leaves(engine: Engine, pattern: str, names: Sequence[Name]) -> Iterator[str]:
    """A sentence for each input, weight or state of that number: no step computes it."""
    for phase_name, phase in engine.programs["decode"].phases.items():
        for index, node in enumerate(phase.graph.nodes):
            full = f"{phase_name}/%{index}"
            if node.is_leaf and pattern in (f"%{index}", full):
                told = f"{full} is the {node.op} {node.name!r}, which {phase_name} does not compute"
                yield f"{told}; {_instead(node, names)}"


def _instead(leaf: Node, names: Sequence[Name]) -> str:
    """Where the values of a leaf can be seen."""
    if leaf.op == "weight":
        return "it is the same in every step, and in the engine's weights file by that name"
    makers = [n.full if n.state else f"{n.phase}/{leaf.name}" for n in names if leaf.name in n.results]
    if not makers:
        return "it comes from the host; watch what is computed from it"
    what = "what a step replaces it by is called" if leaf.op == "state" else "where it is computed, it is called"
    return f"{what} {' and '.join(makers)}"


def require_folder(path: Path) -> None:
    """Raises OptionError where a file cannot be put, since its directory is not there."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"{path} cannot be written: there is no directory {folder}; make it, or name another file")


@dataclass(frozen=True)
class Seen:
    """One value of one step, on the host, without padding."""

    step: int
    name: Name
    tensor: Any

    @property
    def key(self) -> str:
        return f"step{self.step}/{self.name.full}"

    def facts(self) -> dict[str, Any]:
        """Name, type, shape and range. Of no elements, or of NaN alone, the range is None."""
        x = self.tensor.double().flatten()
        rest = x[~x.isnan()]
        low, high, mean = (float(rest.min()), float(rest.max()), float(rest.mean())) if len(rest) else (None,) * 3
        return {
            "name": self.key, "op": self.name.op, "results": list(self.name.results),
            "dtype": str(self.tensor.dtype).removeprefix("torch."), "shape": list(self.tensor.shape),
            "min": low, "max": high, "mean": mean, "nan": len(x) - len(rest), "inf": int(rest.isinf().sum()),
        }  # fmt: skip


class Watch:
    """Keeps the chosen values of the next steps of a backend, which then run node by node; afterwards as before."""

    def __init__(self, engine: Engine, patterns: Sequence[str], steps: int = 1) -> None:
        """Raises OptionError for a pattern about nothing, and for steps that are no integer from 1."""
        _check_asked(patterns, steps)
        self._chosen, self._steps, self._step = chosen(engine, patterns), steps, -1
        phases = engine.programs["decode"].phases
        work = {name: [(name, n) for n in phase.graph.nodes if not n.is_leaf] for name, phase in phases.items()}
        self._first, self._last = work[FRONT[0]][0], [work[name][-1] for name in (TAIL, CONTROLLED_TAIL)]
        self._backend: Backend | None = None
        self.seen: list[Seen] = []

    def start(self, backend: Backend) -> None:
        """From the next launch on; call it on the thread that launches. Raises OptionError while another one looks."""
        if backend.visit is not None:
            raise OptionError("another watch has not seen all its steps; generate until it has, then start this one")
        self._backend, backend.visit = backend, self._visit

    def _visit(self, phase: str, node: Node, outputs: Sequence[Any], sizes: Mapping[str, int]) -> None:
        self._step += (phase, node) == self._first
        for value, tensor in zip(node.outputs, outputs, strict=True):
            if name := self._chosen.get((phase, value)):
                self.seen.append(Seen(self._step, name, _unpadded(value, tensor, sizes)))
        # Not `==`: a step that failed never came to its last node, and was counted.
        if (phase, node) in self._last and self._step + 1 >= self._steps and self._backend:
            self._backend.visit = None

    def save(self, path: Path) -> None:
        """All that was seen, as safetensors: `step0/forward/%6` by name. Raises OptionError without its directory."""
        from safetensors.torch import save_file

        require_folder(path)
        about = {each.key: " ".join((each.name.op, *each.name.results)) for each in self.seen}
        save_file({each.key: each.tensor for each in self.seen}, path, metadata=about)


def _check_asked(patterns: Sequence[str], steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"{steps!r} steps to look into; give an integer, at least 1")
    if isinstance(patterns, str) or not all(isinstance(each, str) for each in patterns):
        raise OptionError(f"patterns={patterns!r} is no list of names; give one like ['logits']")
    if not patterns:
        raise OptionError("there is no name to watch; give at least one, like ['logits']")


def _unpadded(value: Value, tensor: Any, sizes: Mapping[str, int]) -> Any:
    """A copy on the host, of the step's own rows alone."""
    rows = tuple(slice(sizes[d]) if isinstance(d, str) and d in "TSL" else slice(None) for d in value.type.shape)
    return tensor[rows].detach().to("cpu", copy=True).contiguous()
