"""The device at hand, and the software that an engine is compiled with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from penstock.engine.device import CPU, Device
from penstock.errors import OptionError
from penstock.version import __version__


def detect(kind: str = "auto") -> Device:
    """The current GPU for "cuda", the CPU for "cpu", whichever is there for "auto" (a GPU first).

    Raises OptionError for another word, or for "cuda" where torch sees no GPU.
    """
    if kind not in ("auto", "cuda", "cpu"):
        raise OptionError(f"device={kind!r} is not one of auto, cuda, cpu")
    if kind == "cpu":
        return CPU
    import torch

    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(
            "cuda", facts.name, 10 * facts.major + facts.minor, facts.multi_processor_count, facts.L2_cache_size,
            facts.total_memory,
        )  # fmt: skip
    if kind == "cuda":
        raise OptionError(
            "device='cuda' was asked for and torch sees no GPU; use device='cpu', or install a CUDA build of torch"
        )
    return CPU


def software(device: Device) -> Mapping[str, str]:
    """Versions that change what a build measures or stores."""
    names = ("torch",) if device.kind == "cpu" else ("torch", "triton")
    return {"penstock": __version__, **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
