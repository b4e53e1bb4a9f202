"""The device that `check` asks about, found without importing torch; and how much of its memory may be used."""

from __future__ import annotations

import ctypes
import os

from penstock.engine.device import CPU, H200, Device
from penstock.errors import OptionError

MULTIPROCESSORS, L2_BYTES, MAJOR, MINOR = 16, 38, 75, 76  # CUdevice_attribute
MOST_GB = 1e9
RECORDS = {"h200": H200}


def target_device(kind: str) -> Device:
    """The device meant. Raises OptionError for an unknown word, or for "cuda" where the driver shows no GPU."""
    if kind.lower() in RECORDS:
        return RECORDS[kind.lower()]
    if kind not in ("auto", "cuda", "cpu"):
        raise OptionError(f"--device {kind} is not one of auto, cuda, cpu, {', '.join(RECORDS)}")
    if kind == "cpu":
        return CPU
    gpu = driver_device()
    if gpu is None and kind == "cuda":
        raise OptionError("--device cuda: the CUDA driver shows no GPU; use cpu, or name one to plan for: h200")
    return gpu or CPU


def driver_device() -> Device | None:
    """The first GPU that the CUDA driver shows; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(handle), 0):
        return None
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle)

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        return value.value

    capability = 10 * attribute(MAJOR) + attribute(MINOR)
    return Device("cuda", name.value.decode(), capability, attribute(MULTIPROCESSORS), attribute(L2_BYTES), size.value)


def budget_of(device: Device, memory_gb: float | None, utilization: float) -> int:
    """Bytes that a run may use: a share of the GPU's, or the machine's memory. Raises OptionError out of range."""
    if not 0 < utilization <= 1:
        raise OptionError(f"--gpu_memory_utilization {utilization} is outside (0, 1]")
    if memory_gb is not None and not 0 < memory_gb <= MOST_GB:
        raise OptionError(f"--memory_gb {memory_gb} must be positive, at most {MOST_GB:.0f}")
    if device.kind == "cuda":
        return int((memory_gb * 1e9 if memory_gb else device.memory_bytes) * utilization)
    return int(memory_gb * 1e9 if memory_gb else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
