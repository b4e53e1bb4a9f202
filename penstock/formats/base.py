"""The Format record and the registry of formats."""

from __future__ import annotations

from dataclasses import dataclass

from penstock import plugins
from penstock.errors import GraphError

_REGISTRY: dict[str, Format] = {}


@dataclass(frozen=True, slots=True)
class Format:
    """How the elements of a tensor are stored, and what the stored numbers mean.

    A dense format is stored in one physical tensor of `torch_dtype`, and unpacking it is the identity. A quantised
    format names several physical tensors and brings its own `unpack`; it gets a file of its own beside the dense ones.
    """

    name: str  # as printed: "bf16"
    bits: int  # per element, side tensors not counted
    torch_dtype: str  # attribute of the torch module
    triton_dtype: str  # as Triton spells it in a signature: "bf16"
    safetensors_dtype: str  # as a safetensors header spells it: "BF16"
    is_float: bool

    def __str__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        """Bytes per element of a dense format."""
        return self.bits // 8


def register(format: Format) -> Format:
    """Make a format known by name. Raises PluginError for a name that is taken.

    A plugin registers a row of tolerances beside it: see `formats.tolerance`.
    """
    plugins.note("format", format.name, format.name in _REGISTRY, lambda: _REGISTRY.pop(format.name))
    _REGISTRY[format.name] = format
    return format


def stored_as(torch_dtype: str) -> Format:
    """The dense format whose elements are of that torch type; of several the first."""
    return next(format for format in _REGISTRY.values() if format.torch_dtype == torch_dtype)


def known() -> tuple[str, ...]:
    """The names of all registered formats."""
    return tuple(sorted(_REGISTRY))


def parse(name: str) -> Format:
    """The format printed as `name`. Raises GraphError for an unknown one."""
    if name not in _REGISTRY:
        raise GraphError(f"unknown number format {name!r}; known are {', '.join(known())}")
    return _REGISTRY[name]
