"""An engine directory becomes a running loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.errors import EngineMismatch, OptionError
from penstock.kernels.device import detect
from penstock.runtime.executor import Executor
from penstock.runtime.kv.pool import CPU_POOL_BYTES
from penstock.runtime.loop import Loop
from penstock.runtime.step import Backend, CpuBackend
from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Memory:
    """How much of the device may be used: a share of it, or bytes."""

    utilization: float = 0.9
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise OptionError(f"gpu_memory_utilization={self.utilization} is outside (0, 1]")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise OptionError(f"max_gpu_bytes={self.max_bytes} must be positive")

    def budget(self) -> int:
        """Bytes of the current GPU that are free for us."""
        import torch

        free, total = torch.cuda.mem_get_info()
        if self.max_bytes is not None:
            return min(free, self.max_bytes)
        return int(free - (1 - self.utilization) * total)


def open_backend(engine: Engine, directory: Path, memory: Memory) -> Backend:
    """Weights loaded and, on a GPU, the first buckets captured. Raises EngineMismatch for another device."""
    if engine.device.kind == "cpu":
        return CpuBackend(engine, directory, memory.max_bytes or CPU_POOL_BYTES)
    here = detect("auto")
    if (here.kind, here.capability) != (engine.device.kind, engine.device.capability):
        raise EngineMismatch(
            f"the engine was compiled for {engine.device.name} and this is {here.name}; "
            f"run `penstock build` here, or open it with LLM(), which selects its tactics anew"
        )
    from penstock.runtime.cuda import CudaBackend

    return CudaBackend(engine, directory, memory.budget())


def open_loop(directory: Path, memory: Memory = Memory(), tokenizer: Tokenizer | None = None) -> Loop:
    """Load an engine and start its executor. `tokenizer` None: token ids only."""
    engine = store.load(directory)
    return Loop(Executor(engine, open_backend(engine, directory, memory), tokenizer))
