"""CUDA C++ kernels to binaries, by NVRTC, with no GPU at hand. The only module of the package that compiles with it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from penstock.errors import BuildError
from penstock.kernels.compile import Binary, instruction_of
from penstock.kernels.tactic import CudaKernel

REMEDY = "pip install 'penstock[gpu]' brings it"


@lru_cache(maxsize=1)
def _nvrtc() -> Any:
    """The compiler's bindings. Raises BuildError where they, or the library itself, are missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # the library is looked for at the first call
        raise BuildError(f"compiling CUDA kernels needs NVRTC, which is missing ({error}); {REMEDY}") from error
    return nvrtc


def compile_cuda(kernel: CudaKernel, capability: int) -> Binary:
    """Compile for compute capability `capability` (90 for 9.0). Raises BuildError with the kernel's name."""
    nvrtc = _nvrtc()
    source, *headers = kernel.files
    texts, names = [h.read_bytes() for h in headers], [h.name.encode() for h in headers]
    program = _check(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), texts, names), kernel
    )
    try:
        options = _options(kernel, capability)
        if int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]):
            log = _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program, kernel)
            raise BuildError(f"{kernel.source} does not compile for sm_{capability}: {log.decode(errors='replace')}")
        cubin = _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program, kernel)
        ptx = _bytes(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program, kernel).rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    entry = kernel.source.split(":")[1]
    return Binary(entry, kernel.num_warps, kernel.shared, 0, cubin, ptx, instruction_of(ptx), null_pointers=0)


def _options(kernel: CudaKernel, capability: int) -> list[bytes]:
    own = "a" if capability >= 90 else ""  # with instructions that this capability alone has, such as wgmma
    macros = (f"-D{name}={value}" for name, value in kernel.constants)
    return [x.encode() for x in (f"--gpu-architecture=sm_{capability}{own}", "--std=c++17", *macros)]


def _check(result: tuple[Any, ...], kernel: CudaKernel) -> Any:
    if int(result[0]):
        raise BuildError(f"{kernel.source}: NVRTC failed with {result[0]!r}")
    return result[1] if len(result) > 1 else None


def _bytes(size: Any, get: Any, program: Any, kernel: CudaKernel) -> bytes:
    data = b" " * int(_check(size(program), kernel))
    _check(get(program, data), kernel)
    return data
