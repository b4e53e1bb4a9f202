"""Finding tactics: every Tactic subclass defined in a module of a folder under `kernels/` is a candidate for its op."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from inspect import isabstract, isclass

from penstock import kernels, plugins
from penstock.ir.op import get
from penstock.kernels.tactic import PARTS, REFERENCE, Tactic

_EXTRA: list[Tactic] = []


@lru_cache(maxsize=1)
def builtin() -> tuple[Tactic, ...]:
    """The package's own tactics, ordered by op and name. Modules named *_triton hold kernel sources and are skipped."""
    found: dict[tuple[str, str], Tactic] = {}
    for info in pkgutil.walk_packages(kernels.__path__, "penstock.kernels."):
        if not info.ispkg and not info.name.endswith("_triton"):
            for tactic in _defined_in(info.name):
                assert (tactic.op, tactic.name) not in found, f"two tactics {tactic.name} for {tactic.op}"
                found[tactic.op, tactic.name] = tactic
    return tuple(found[key] for key in sorted(found))


def register(tactic: Tactic) -> None:
    """Add a plugin's tactic; it is gated and timed like ours.

    Raises PluginError for a name that the op's tactics have already, GraphError for an op that does not exist.
    """
    get(tactic.op)
    taken = tactic.name in (REFERENCE, PARTS) or any(t.name == tactic.name for t in tactics(tactic.op))
    plugins.note("tactic", f"{tactic.op}={tactic.name}", taken, lambda: _EXTRA.remove(tactic))
    _EXTRA.append(tactic)


def unregister(tactic: Tactic) -> None:
    plugins.forget("tactic", f"{tactic.op}={tactic.name}")
    _EXTRA.remove(tactic)


def tactics(op: str) -> tuple[Tactic, ...]:
    """The candidates for an op, without the reference and `parts`, which exist for every op by derivation."""
    return tuple(t for t in (*builtin(), *_EXTRA) if t.op == op)


def _defined_in(name: str) -> Iterator[Tactic]:
    module = importlib.import_module(name)
    for item in vars(module).values():
        own = isclass(item) and issubclass(item, Tactic) and not isabstract(item) and item.__module__ == name
        if own and hasattr(item, "op"):  # the derived tactics get theirs when they are made
            yield item()
