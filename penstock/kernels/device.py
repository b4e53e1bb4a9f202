"""The device at hand, and the software that an engine is compiled with."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from penstock.engine.device import CPU, Device
from penstock.errors import OptionError
from penstock.version import __version__

ABSENT = "absent"


def detect(kind: str = "auto") -> Device:
    """The current GPU for "cuda", the CPU for "cpu", whichever is there for "auto" (a GPU first).

    Raises OptionError for another word, or for "cuda" where torch sees no GPU. Where torch is not imported yet and the
    driver answers for it, it stays so: a build has seconds of work that need no torch.
    """
    if kind not in ("auto", "cuda", "cpu"):
        raise OptionError(f"device={kind!r} is not one of auto, cuda, cpu")
    if kind == "cpu":
        return CPU
    if "torch" not in sys.modules and (found := _by_driver()) is not None:
        return found
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


def _by_driver() -> Device | None:
    """The first GPU that the driver shows, if torch is made for GPUs; None where only torch can tell."""
    try:
        from cuda.bindings import driver

        started = _torch_is_for_cuda() and not int(driver.cuInit(0)[0])
    except (ImportError, OSError, RuntimeError):  # the bindings look for the driver itself at the first call
        return None
    if not started:
        return None
    status, gpu = driver.cuDeviceGet(0)
    if int(status):
        return None
    names = "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT", "L2_CACHE_SIZE"
    kinds = (getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names)
    asked = [driver.cuDeviceGetAttribute(kind, gpu) for kind in kinds]
    asked += [driver.cuDeviceGetName(256, gpu), driver.cuDeviceTotalMem(gpu)]
    if any(int(status) for status, _ in asked):
        return None
    major, minor, processors, cache, name, memory = (value for _, value in asked)
    text = name.split(b"\0")[0].decode()
    return Device("cuda", text, 10 * int(major) + int(minor), int(processors), int(cache), int(memory))


def _torch_is_for_cuda() -> bool:
    """From the installed torch's own record, which is read, not imported."""
    spec = find_spec("torch")
    record = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return record is not None and record.is_file() and bool(re.search(r"^cuda\b.*=\s*['\"]", record.read_text(), re.M))


def software(device: Device) -> Mapping[str, str]:
    """Versions that change what a build measures or stores."""
    found = {"penstock": __version__, "torch": _version("torch")}
    return found if device.kind == "cpu" else {**found, "triton": _version("triton"), "nvrtc": _nvrtc()}


def _nvrtc() -> str:
    """Of the library that compiles CUDA kernels: the wheel's, where the bindings look first, or what it says itself."""
    old = _version("cuda-bindings").startswith("12.")
    wheel = _version("nvidia-cuda-nvrtc" + ("-cu12" if old else ""))
    if wheel != ABSENT:
        return wheel
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError):
        return ABSENT
    return ABSENT if int(status) else f"{major}.{minor}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT
