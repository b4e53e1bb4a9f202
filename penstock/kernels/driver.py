"""Stored binaries, loaded and launched through the CUDA driver. Needs neither triton nor a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from penstock.errors import EngineMismatch, ExecutorError

LARGE_SHARED = 48 << 10  # bytes; above it a kernel must ask for its dynamic shared memory


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise EngineMismatch("running on a GPU needs the package cuda-bindings: pip install 'penstock[gpu]'") from None
    return driver


def _check(result: tuple[Any, ...], what: str) -> Any:
    if int(result[0]):
        raise ExecutorError(f"{what} failed: {result[0]!r}")
    return result[1] if len(result) > 1 else None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel."""

    function: Any
    threads: int
    shared: int  # bytes
    library: Any  # kept alive as long as the kernel


def load(cubin: bytes, facts: Mapping[str, Any]) -> Kernel:
    """Load a binary. `facts`: entry, num_warps, shared. Raises EngineMismatch where this GPU cannot run it."""
    cuda = _driver()
    result = cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0)
    if int(result[0]):
        raise EngineMismatch(
            f"kernel {facts['entry']} does not load on this GPU ({result[0]!r}); build the engine again here"
        )
    library = result[1]
    kernel = _check(cuda.cuLibraryGetKernel(library, facts["entry"].encode()), f"finding kernel {facts['entry']}")
    function = _check(cuda.cuKernelGetFunction(kernel), f"loading kernel {facts['entry']}")
    if facts["shared"] > LARGE_SHARED:
        limit = cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(
            cuda.cuFuncSetAttribute(function, limit, facts["shared"]), f"reserving shared memory of {facts['entry']}"
        )
    return Kernel(function, 32 * facts["num_warps"], facts["shared"], library)


def load_file(folder: Path, key: str, facts: Mapping[str, Any]) -> Kernel:
    """Load `folder/key.cubin`."""
    return load((folder / f"{key}.cubin").read_bytes(), facts)


def launch(
    kernel: Kernel, grid: tuple[int, int, int], values: Sequence[tuple[int, bool]], stream: int, dependent: bool
) -> None:
    """Launch on a stream. `values`: (number, is a pointer). Triton's two scratch pointers are appended as null."""
    cuda = _driver()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes = kernel.shared
    config.hStream = stream
    if dependent:
        attribute = cuda.CUlaunchAttribute()
        attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    numbers = (*(v for v, _ in values), 0, 0)
    types = (*(ctypes.c_void_p if pointer else ctypes.c_int for _, pointer in values), ctypes.c_void_p, ctypes.c_void_p)
    _check(cuda.cuLaunchKernelEx(config, kernel.function, (numbers, types), 0), "a kernel launch")
