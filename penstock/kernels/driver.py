"""Stored binaries, loaded and launched through the CUDA driver. Needs neither triton nor a compiler."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from penstock.engine.program import KernelLaunch, Tile
from penstock.errors import EngineMismatch, ExecutorError, ResourceError

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
    null_pointers: int  # behind the arguments


def load(cubin: bytes, facts: Mapping[str, Any]) -> Kernel:
    """Load a binary. `facts`: entry, num_warps, shared, null_pointers.

    Raises EngineMismatch where this GPU cannot run it.
    """
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
    return Kernel(function, 32 * facts["num_warps"], facts["shared"], library, facts["null_pointers"])


def load_file(folder: Path, key: str, facts: Mapping[str, Any]) -> Kernel:
    """Load `folder/key.cubin`."""
    return load((folder / f"{key}.cubin").read_bytes(), facts)


def launch(kernel: Kernel, how: KernelLaunch, values: Sequence[tuple[Any, bool]], stream: int) -> None:
    """Launch on a stream. `values`: (number or tensor map, is a pointer). The kernel's null pointers are appended."""
    cuda = _driver()
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = how.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes = kernel.shared
    config.hStream = stream
    if attributes := _attributes(how):
        config.attrs, config.numAttrs = attributes, len(attributes)
    numbers = (*(v for v, _ in values), *(0,) * kernel.null_pointers)
    types = (*(_ctype(v, pointer) for v, pointer in values), *(ctypes.c_void_p,) * kernel.null_pointers)
    _check(cuda.cuLaunchKernelEx(config, kernel.function, (numbers, types), 0), "a kernel launch")


def _attributes(how: KernelLaunch) -> list[Any]:
    """How the launch stands to the one ahead of it, and whether its blocks must all run at once."""
    cuda, found = _driver(), []
    kinds = cuda.CUlaunchAttributeID
    if how.dependent:
        found.append(cuda.CUlaunchAttribute())
        found[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        found[-1].value.programmaticStreamSerializationAllowed = 1
    if how.cooperative:
        found.append(cuda.CUlaunchAttribute())
        found[-1].id, found[-1].value.cooperative = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1
    return found


def _ctype(value: Any, pointer: bool) -> Any:
    if not isinstance(value, int):
        return None  # a structure, which knows its bytes
    return ctypes.c_void_p if pointer else ctypes.c_int


def tensor_map(address: int, tile: Tile) -> Any:
    """A tensor map of the matrix at `address`. Raises ExecutorError where the copy engine cannot read it."""
    cuda = _driver()
    kinds = cuda.CUtensorMapDataType
    types = {
        "bf16": kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "f16": kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    (rows, columns), (height, width) = tile.shape, tile.box
    line = 2 * columns  # bytes
    shape, strides, box = [columns, rows], [line], [width, height]
    if tile.turns:
        shape, strides, box = (
            [columns, 8, 2, rows // 16],
            [line, rows // 2 * line, 8 * line],
            [width, 8, 2, height // 16],
        )
    sizes, steps = [*map(cuda.cuuint64_t, shape)], [*map(cuda.cuuint64_t, strides)]
    boxes, ones = [*map(cuda.cuuint32_t, box)], [cuda.cuuint32_t(1)] * len(box)
    result = cuda.cuTensorMapEncodeTiled(
        types[tile.format], len(box), address, sizes, steps, boxes, ones,
        cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    return _check(result, f"a tensor map of {tile} at address {address:#x}")


class Pinned:
    """So many bytes of the host's memory, none more, that the GPU copies by itself. `free` gives them back."""

    def __init__(self, size: int) -> None:
        """Raises ResourceError where the host does not have them."""
        self.address = 0
        self.free: Callable[[], object] = lambda: None
        if size:
            cuda = _driver()
            error, address = cuda.cuMemAllocHost(size)
            if int(error):
                raise ResourceError(f"the host has no {size} bytes to pin ({error!r}); lower host_cache_size")
            self.address = int(address)
            self.free = finalizer = weakref.finalize(self, cuda.cuMemFreeHost, self.address)
            finalizer.atexit = False  # the process's end does, and until then they may be copied from


def copy(target: int, source: int, size: int, stream: int) -> None:
    """Bytes from one address to another, when the stream gets there; memory of the host is pinned."""
    _check(_driver().cuMemcpyAsync(target, source, size, stream), "a copy")
