"""Plugins: modules that register families, ops, passes, formats, layouts, calls and tactics when they are imported.

An installed package names its module by an entry point of the group `penstock.plugins`; any other module is named by
whoever wants it. A plugin is known by its module, whichever way it came. Each registry calls `note`, so that it is on
record what came from where; what a failed plugin had registered is taken back. A module that registers without being
loaded as a plugin, a script's own parts say, is on record under its own name.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

from penstock.errors import OptionError, PenstockError, PluginError

GROUP = "penstock.plugins"
SOURCES = (".py", ".cu", ".cuh")
RUNNING = ("op", "format", "call")  # kinds of parts that an engine cannot run without
ALONE = ("family", "pass")  # kinds that only the process which builds needs
SCRIPT = "__main__"

Part = tuple[str, str]  # kind and name; a tactic's is OP=NAME
Record = Mapping[str, Mapping[str, Any]]  # what an engine says of the plugins it was built with, by module


@dataclass(frozen=True, slots=True)
class _Note:
    owner: str  # module
    undo: Callable[[], object]


_NOTES: dict[Part, _Note] = {}
_LOADED: dict[str, str] = {}  # module -> version of its distribution, or its own; empty where it states none
_LOADING: list[str] = []
_LOCK = RLock()


def load(modules: Iterable[str] = ()) -> None:
    """Import every installed plugin, then these modules, each once.

    Raises OptionError for what is no module's name; PluginError, naming the plugin, where it cannot be imported or
    registers what exists already.
    """
    named = tuple(modules) if isinstance(modules, Iterable) and not isinstance(modules, str) else ()
    if isinstance(modules, str) or not isinstance(modules, Iterable) or not all(isinstance(m, str) for m in named):
        raise OptionError(f"plugins={modules!r} is no list of modules' names; give one like ['package.module']")
    from importlib.metadata import entry_points  # with all that it imports, a price that `--help` need not pay

    with _LOCK:
        for entry in sorted(entry_points(group=GROUP), key=lambda each: each.value):
            called = f"plugin {entry.value!r}, entry point {entry.name!r},"
            _load(entry.value, called, entry.dist.version if entry.dist else None)
        load_named(named)


def load_named(modules: Iterable[str]) -> None:
    """These alone: what another process has `loaded`."""
    with _LOCK:
        for module in modules:
            _load(module, f"--plugin {module!r}")


def _load(module: str, called: str, version: str | None = None) -> None:
    if module in _LOADED:
        return
    if not all(part.isidentifier() for part in module.split(".")):
        raise OptionError(f"{called} is no module's name; give one like package.module")
    known = set(_NOTES)
    _LOADING.append(module)
    try:
        imported = importlib.import_module(module)
    except PluginError as error:
        _take_back(known, module)
        raise PluginError(f"{called}: {error}") from error
    except (Exception, SystemExit) as error:  # a border: whatever another's module raises is reported under its name
        _take_back(known, module)
        raise PluginError(
            f"{called} cannot be imported: {type(error).__name__}: {error}; mend it, install it, put its folder on "
            f"PYTHONPATH, or leave it out"
        ) from error
    except BaseException:
        _take_back(known, module)
        raise
    finally:
        _LOADING.pop()
    _LOADED[module] = str(version or getattr(imported, "__version__", ""))
    for part, note in _NOTES.items():  # imported before it was loaded as a plugin
        if note.owner.startswith(f"{module}."):
            _NOTES[part] = _Note(module, note.undo)


def unload(module: str) -> None:
    """Take back all that a plugin registered; the next `load` imports it anew."""
    _take_back({part for part, note in _NOTES.items() if note.owner != module}, module)
    _LOADED.pop(module, None)
    _hash.cache_clear()


def _take_back(kept: set[Part], module: str) -> None:
    """All parts but these, the last first; and the imports, so that they are made anew."""
    for part in reversed([part for part in _NOTES if part not in kept]):
        _NOTES.pop(part).undo()
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        del sys.modules[name]


def note(kind: str, name: str, taken: bool, undo: Callable[[], object]) -> None:
    """A registry is about to take a part in. `taken`: the name is in use. `undo` makes the registry forget it.

    Raises PluginError for a name that is taken.
    """
    owner = _owner()
    if taken:
        other = _NOTES.get((kind, name))
        whose = f"plugin {other.owner}" if other else "penstock itself"
        raise PluginError(f"{kind} {name!r} is registered by {whose} already; give it another name")
    if owner is not None:
        _NOTES[kind, name] = _Note(owner, undo)


def forget(kind: str, name: str) -> None:
    """A registry dropped a part."""
    _NOTES.pop((kind, name), None)


def _owner() -> str | None:
    """The plugin being loaded, or the module that registers outside of one; None for our own modules.

    Our modules may be imported by a plugin, so what counts is who calls the registry.
    """
    frame = sys._getframe(2)
    registry = frame.f_globals["__name__"]
    while frame.f_globals.get("__name__") == registry and frame.f_back is not None:
        frame = frame.f_back
    caller = str(frame.f_globals.get("__name__"))
    if caller.split(".")[0] == "penstock":
        return None
    return _LOADING[-1] if _LOADING else caller


def shared() -> tuple[str, ...]:
    """The modules that another process has to load to know the same, in order: those that were only imported too.

    Raises PluginError for what a script registered in its own body, which no other process can import.
    """
    owners = {note.owner: part for part, note in reversed(_NOTES.items()) if part[0] not in ALONE}
    if SCRIPT in owners:
        kind, name = owners[SCRIPT]
        raise PluginError(
            f"{kind} {name!r} is registered by the script that runs, and the processes that compile and time for a GPU "
            f"cannot import it; move it into a module, and name that: --plugin MODULE, or plugins=['MODULE']"
        )
    return tuple(dict.fromkeys((*_LOADED, *reversed(owners))))


@contextmanager
def border(*parts: Part) -> Iterator[None]:
    """Where parts are run: what one of a plugin raises becomes a PluginError that names it. Ours go through."""
    try:
        yield
    except PenstockError:
        raise
    except (Exception, SystemExit) as error:  # a border: as of the import
        part = next((part for part in parts if owner(*part)), None)
        if part is None:
            raise
        raise PluginError(
            f"{part[0]} {part[1]!r} of plugin {owner(*part)} failed: {type(error).__name__}: {error}; mend it, or "
            f"leave the plugin out"
        ) from error


def owner(kind: str, name: str) -> str | None:
    """The plugin that a part came from; None where it is ours or unknown."""
    found = _NOTES.get((kind, name))
    return found.owner if found else None


def registered(kind: str) -> tuple[str, ...]:
    """What plugins registered of a kind."""
    return tuple(name for each, name in _NOTES if each == kind)


def identity(module: str) -> dict[str, str]:
    """A plugin's version and a hash of its sources: of the module's file, or of the package's, kernels included."""
    return {"version": _LOADED.get(module, ""), "sources": _hash(module)}


def identities() -> dict[str, dict[str, str]]:
    """Of every plugin: any may change what a build does."""
    return {module: identity(module) for module in sorted({*_LOADED, *(note.owner for note in _NOTES.values())})}


def stamp(*parts: Part) -> str:
    """Whose these are, for keys of what is kept; empty where they are all ours."""
    owners = dict.fromkeys(found for part in parts if (found := owner(*part)))
    return "".join(f" {module} {' '.join(identity(module).values())}" for module in owners)


@lru_cache(maxsize=64)
def _hash(module: str) -> str:
    """Of the sources as they were when it was first asked for."""
    origin = getattr(sys.modules.get(module), "__file__", None)
    if origin is None:
        return ""
    path = Path(origin)
    files = sorted(p for p in path.parent.rglob("*") if p.suffix in SOURCES) if path.stem == "__init__" else [path]
    if path.stem != "__init__":
        files += sorted(p for p in path.parent.glob(f"{path.stem}*") if p.suffix in SOURCES and p != path)
    return hashlib.sha256(b"".join(p.read_bytes() for p in files if p.is_file())).hexdigest()[:16]


def record(parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """What an engine made with these parts says of the plugins they came from."""
    found: dict[str, dict[str, Any]] = {}
    for kind, name in sorted(set(parts)):
        if module := owner(kind, name):
            entry = found.setdefault(module, {**identity(module), "parts": {}})
            entry["parts"].setdefault(kind, []).append(name)
    return found


def require(recorded: Record) -> None:
    """Raises PluginError where an engine needs a part to run that no plugin has registered.

    An installed plugin is loaded for it; another is not: an engine's files name no code to be run.
    """
    if not all(part in _NOTES for _, part in _needed(recorded)):
        load()
    for module, (kind, name) in _needed(recorded):
        if (kind, name) not in _NOTES:
            version = f" {stated}" if (stated := recorded[module]["version"]) else ""
            raise PluginError(
                f"the engine needs plugin {module}{version} for its {kind} {name!r}, and it is not loaded; install it, "
                f"or name it: --plugin {module}, or plugins=[{module!r}]"
            )


def difference(recorded: Record) -> str | None:
    """One sentence on the first plugin that an engine needs and that is not what it was; None where there is none."""
    for module in dict.fromkeys(module for module, _ in _needed(recorded)):
        was, now = ({key: recorded[module].get(key) for key in identity(module)}, identity(module))
        if was != now:
            shown = (" ".join(filter(None, map(str, each.values()))) for each in (was, now))
            return "the engine was compiled with plugin {} {}, and this is {}".format(module, *shown)
    return None


def _needed(recorded: Record) -> list[tuple[str, Part]]:
    return [
        (module, (kind, name))
        for module, entry in recorded.items()
        for kind, names in entry["parts"].items()
        for name in names
        if kind in RUNNING
    ]
