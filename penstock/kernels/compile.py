"""Kernels to binaries, with no GPU at hand. The only module of the package that imports triton to compile."""

from __future__ import annotations

import importlib
import json
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.errors import BuildError
from penstock.kernels.tactic import Kernel, TritonKernel

TRITON_POINTERS = 2  # null pointers behind the arguments of a Triton kernel: global and profiling scratch


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel and what a launch must know of it."""

    entry: str  # the function's name in the binary
    num_warps: int
    shared: int  # bytes of dynamic shared memory
    global_scratch: int  # bytes a launch must provide; ours need none
    cubin: bytes
    ptx: str = ""
    instruction: str = ""  # what multiplies: "wgmma", "mma" or "fma"; empty where it was not noted
    null_pointers: int = TRITON_POINTERS  # that a launch appends to its arguments

    def facts(self) -> dict[str, Any]:
        """Everything but the binary itself."""
        data = asdict(self)
        del data["cubin"], data["ptx"]
        return data


def load_compiler() -> None:
    """Import the compiler ahead of the first kernel: it takes a second."""
    importlib.import_module("triton.compiler")


def compile_kernel(kernel: Kernel, capability: int) -> Binary:
    """Compile for compute capability `capability` (90 for 9.0). Raises BuildError with the kernel's name."""
    if isinstance(kernel, TritonKernel):
        return compile_triton(kernel, capability)
    from penstock.kernels.compile_cuda import compile_cuda

    return compile_cuda(kernel, capability)


def compile_triton(kernel: TritonKernel, capability: int) -> Binary:
    """Compile for compute capability `capability` (90 for 9.0). Raises BuildError with the kernel's name."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, name = kernel.source.split(":")
    function = getattr(importlib.import_module(module), name)
    signature = dict(kernel.signature) | {k: "constexpr" for k, _ in kernel.constants}
    ordered = {p: signature[p] for p in function.arg_names}
    pointers = [p for p, t in kernel.signature if t.startswith("*")]
    attrs = {(function.arg_names.index(p),): [["tt.divisibility", 16]] for p in (*pointers, *kernel.aligned)}
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "launch_pdl": True}
    source = ASTSource(function, ordered, {(function.arg_names.index(k),): v for k, v in kernel.constants}, attrs)
    try:
        built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except (
        Exception
    ) as error:  # the compiler raises whatever it likes; a kernel that does not compile is one tactic less
        raise BuildError(f"{kernel.source} does not compile for sm_{capability}: {error}") from error
    meta = built.metadata
    scratch = int(getattr(meta, "global_scratch_size", 0) or 0)
    cubin, ptx = built.asm["cubin"], built.asm["ptx"]
    return Binary(meta.name, kernel.num_warps, int(meta.shared), scratch, cubin, ptx, instruction_of(ptx))


def instruction_of(ptx: str) -> str:
    """The widest instruction that multiplies: Hopper's warp-group product, a warp's, or none but scalar ones."""
    return "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma"


def store(binary: Binary, folder: Path, key: str) -> None:
    """Write `key.cubin` and `key.json`; the binary first, so that a record never lacks its binary."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, data in ((".cubin", binary.cubin), (".json", json.dumps(binary.facts(), indent=1).encode())):
        part = folder / f"{key}{suffix}.{secrets.token_hex(4)}.part"  # two builds may compile the same kernel at once
        part.write_bytes(data)
        part.replace(folder / f"{key}{suffix}")


def stored(folder: Path, key: str) -> Binary | None:
    """A binary that `store` wrote, or None."""
    if not (folder / f"{key}.json").exists():
        return None
    facts = json.loads((folder / f"{key}.json").read_text())
    return Binary(cubin=(folder / f"{key}.cubin").read_bytes(), **facts)
