"""The families known by architecture, ours and those of a user's package."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from penstock import plugins
from penstock.errors import ConfigError, ModelError, UnsupportedArchitectureError
from penstock.ir import Value
from penstock.models import families
from penstock.models.binding import Source, bind, declared, shapes, sourced
from penstock.models.config import MAX_SIZE, Reader, close
from penstock.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """One lineage of models: how its config is read, and what its checkpoints call each weight.

    `read` consumes the keys that it understands; whatever it leaves and `config.IGNORED` does not excuse is an error.
    """

    name: str  # the config's model_type
    architectures: tuple[str, ...]
    read: Callable[[Reader], ModelSpec]
    source: Source  # where a canonical weight comes from: a tensor's name, or an expression over tensors
    ignored: tuple[str, ...] = ()  # regular expressions of checkpoint tensors that are no weights
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement) from other spellings of tensors to `source`'s
    by_config: Callable[[Mapping[str, Any]], Source] | None = None  # `source` of a config, where files are of two kinds

    def source_of(self, config: Mapping[str, Any]) -> Source:
        return self.by_config(config) if self.by_config else self.source


MAX_FLOAT = 3.4e38  # of float32, in which factors are applied
_FAMILIES: dict[str, Family] = {}  # by architecture


def register(family: Family) -> Family:
    """Make a plugin's family known.

    Raises ModelError where another one implements one of its architectures, PluginError for a name that is taken.
    """
    _load_built_in()
    for pattern in (*family.ignored, *(pattern for pattern, _ in family.renamed)):
        re.compile(pattern)  # raises here, not when a checkpoint is read
    new = {name: family for name in family.architectures if _is_free(name, family)}
    known = {each.name for each in _FAMILIES.values() if each != family}
    plugins.note("family", family.name, family.name in known, lambda: [_FAMILIES.pop(name) for name in new])
    _FAMILIES.update(new)
    return family


def _is_free(architecture: str, family: Family) -> bool:
    other = _FAMILIES.get(architecture)
    if other is not None and other != family:
        raise ModelError(f"family {other.name!r} already reads architecture {architecture!r}; register another")
    return other is None


def families_known() -> tuple[Family, ...]:
    """Each once, in the order of their files; plugins' that are loaded behind ours."""
    _load_built_in()
    return tuple({id(family): family for family in _FAMILIES.values()}.values())


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that reads this config: by `architectures` where it says so, else by `model_type`.

    Raises UnsupportedArchitectureError naming the known ones. Installed plugins are loaded for what is not built in.
    """
    stated = config.get("architectures") or []
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ConfigError(f"config.json: architectures = {stated!r} is not implemented; expected a list of names")
    for load in (_load_built_in, plugins.load):
        load()
        if family := _find(stated, config.get("model_type")):
            return family
    raise UnsupportedArchitectureError(
        f"no family implements architectures {stated} (model_type {config.get('model_type')!r}); known are "
        f"{', '.join(sorted(_FAMILIES))}; "
        "a plugin may add one: --plugin MODULE, or a package's entry point penstock.plugins"
    )


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """What the model is. Raises ConfigError for any key or value that is not fully understood."""
    family = family_of(config)
    reader = Reader(config)
    try:
        with plugins.border(("family", family.name)):
            spec = family.read(reader)
            close(reader)
    except ArithmeticError as error:
        raise ConfigError(
            f"config.json: its numbers together give none that a float holds ({error}); correct"
        ) from None
    if not isinstance(spec, ModelSpec):
        raise ModelError(
            f"family {family.name!r} reads the config as a {type(spec).__name__}, not a ModelSpec; mend it"
        )
    _check_numbers(spec)
    return spec


def _check_numbers(spec: ModelSpec) -> None:
    """Raises ConfigError for what each key alone may say, and all together may not: sizes and factors of the model."""
    for name, shape in shapes(spec).items():
        if max(shape) > MAX_SIZE:
            raise ConfigError(f"config.json: {name} is to be of shape {shape}; at most {MAX_SIZE} can be indexed")
    values: list[Any] = [spec.to_json()]
    while values:
        value = values.pop()
        if isinstance(value, float) and not abs(value) <= MAX_FLOAT:
            raise ConfigError(f"config.json: its numbers give a factor of {value}, at most {MAX_FLOAT:g}; correct them")
        if isinstance(value, dict | list):
            values.extend(value.values() if isinstance(value, dict) else value)


def weights(spec: ModelSpec, config: Mapping[str, Any], format: str) -> dict[str, Value]:
    """Canonical name -> expression over this family's checkpoint tensors, each read in `format`."""
    family = family_of(config)
    with plugins.border(("family", family.name)):
        return bind(spec, format, family.source_of(config))


def ignored_tensors(spec: ModelSpec, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Regular expressions of the tensors that a checkpoint may hold beside the weights."""
    family = family_of(config)
    if spec.head and not spec.tied_head:
        return family.ignored
    whole, names = replace(spec, tied_head=False, head=True), ["head.weight"]
    names += ["head.bias"] if spec.head_bias and not spec.head else []
    heads = {name: sourced(whole, name, "f32", family.source_of(config)) for name in names}
    return (*family.ignored, *map(re.escape, declared(heads)))


def _find(architectures: list[str], model_type: Any) -> Family | None:
    if architectures:
        return next((_FAMILIES[name] for stated in architectures for name in _whole(stated) if name in _FAMILIES), None)
    return next((family for family in _FAMILIES.values() if family.name == model_type), None)


def _whole(architecture: str) -> Iterator[str]:
    """Its name, and of a model that was stored without its head those of the whole."""
    yield architecture
    if architecture.endswith("Model"):
        yield from (architecture.removesuffix("Model") + end for end in ("ForCausalLM", "LMHeadModel"))


@lru_cache(maxsize=1)
def _load_built_in() -> None:
    """Every file of `families` that defines FAMILY, or FAMILIES where one lineage has several."""
    for found in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{found.name}")
        for family in getattr(module, "FAMILIES", None) or [f for f in [getattr(module, "FAMILY", None)] if f]:
            _FAMILIES.update({name: family for name in family.architectures if _is_free(name, family)})
