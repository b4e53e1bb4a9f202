"""An engine directory becomes a running loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.match import COMPILES_ONLY, mismatch
from penstock.engine.memory import plan_run
from penstock.engine.profile import Profile
from penstock.errors import EngineMismatch, OptionError, ResourceError, UnsupportedError
from penstock.kernels.device import detect, software
from penstock.runtime.executor import Executor
from penstock.runtime.kv.pool import CPU_POOL_BYTES
from penstock.runtime.loop import Loop
from penstock.runtime.pace import Pace
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.step import Backend, CpuBackend
from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Memory:
    """How much of the device may be used: a share of it, or bytes."""

    utilization: float = 0.9
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        share, most = self.utilization, self.max_bytes
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:  # so NaN is out
            raise OptionError(f"gpu_memory_utilization={share!r} is outside (0, 1]; give a share such as 0.9")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise OptionError(f"max_gpu_bytes={most!r} is no integer from 1; give bytes, such as {20 << 30} for 20 GiB")

    def check_for(self, kind: str) -> None:
        """Raises OptionError for a limit of a GPU's memory on a device that is none."""
        if kind == "cpu" and self.max_bytes is not None:
            raise OptionError(
                f"max_gpu_bytes={self.max_bytes} limits a GPU's memory, and this runs on the CPU; leave it out"
            )

    def budget(self) -> int:
        """Bytes of the current GPU that are free for us."""
        import torch

        free, total = torch.cuda.mem_get_info()
        if self.max_bytes is not None:
            return min(free, self.max_bytes)
        return int(free - (1 - self.utilization) * total)


@dataclass(frozen=True)
class RunLimits:
    """Limits of a run: the first three at most those of the engine's profile, and None its own.

    max_num_queued_reqs, max_num_queued_tokens: of the queue; None: no limit. enable_prefix_caching: whether the KV of
    equal prefixes is computed once. inter_token_latency_target: seconds between the tokens of running requests, which
    prompts of others may not stretch; None: no target. host_cache_size: bytes of the host's memory for KV blocks that
    make room for others; 0: none.
    """

    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    enable_prefix_caching: bool = True
    inter_token_latency_target: float | None = None
    host_cache_size: int = 0

    def __post_init__(self) -> None:
        size = self.host_cache_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise OptionError(
                f"host_cache_size={size!r} is no integer from 0; give bytes, such as {8 << 30} for 8 GiB, or 0 for none"
            )
        if size and not self.enable_prefix_caching:
            raise OptionError(
                f"host_cache_size={size} keeps what enable_prefix_caching=False never asks for; leave out one of them"
            )

    def host_blocks(self, engine: Engine) -> int:
        """KV blocks of each group that host_cache_size holds. Raises OptionError for not even one, or for a model whose
        prefixes are not found again, ResourceError for too many."""
        size, block = self.host_cache_size, engine.block_bytes
        if size and engine.besides:
            raise OptionError(
                f"host_cache_size={size} keeps prefixes, and this model's are not found again: it has state besides KV "
                f"({engine.besides}); leave it out"
            )
        if 0 < size < block:
            raise OptionError(f"host_cache_size={size} is less than a KV block of {block} bytes; give that, or 0")
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > there:
            raise ResourceError(f"host_cache_size={size} is more than the {there} bytes of this host; lower it")
        return size // block if size else 0  # without KV a block has no bytes

    def within(self, profile: Profile) -> Limits:
        """The scheduler's limits. Raises OptionError for one that is no integer, or above the profile's."""
        queued = {name: getattr(self, name) for name in ("max_num_queued_reqs", "max_num_queued_tokens")}
        for name, value in queued.items():
            _check_integer(name, value)
        if not isinstance(self.enable_prefix_caching, bool):
            raise OptionError(f"enable_prefix_caching={self.enable_prefix_caching!r} is no flag; give True or False")
        chosen: dict[str, int] = {}
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            value, most = getattr(self, name), getattr(profile, name)
            _check_integer(name, value)
            if value is not None and value > most:
                raise OptionError(f"{name}={value} exceeds the {most} that the engine was built for; build it for more")
            chosen[name] = most if value is None else value
        return Limits(**chosen, **queued)


def _check_integer(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise OptionError(f"{name}={value!r} is a {type(value).__name__}; give an integer")


Say = Callable[[str], None]  # hears the memory plan before anything is loaded


def _silent(text: str) -> None: ...


def open_backend(
    engine: Engine,
    directory: Path,
    memory: Memory,
    limits: Limits | None = None,
    say: Say = _silent,
    host_blocks: int = 0,
) -> Backend:
    """Weights loaded and, on a GPU, the first buckets captured; `limits` None: the profile's own. `host_blocks`: KV
    blocks of each group in the host's memory.

    Raises ResourceError, before anything is loaded, where memory does not suffice; OptionError for a GPU's limit on a
    CPU.
    """
    memory.check_for(engine.device.kind)
    if engine.device.kind == "cpu":
        return CpuBackend(engine, directory, CPU_POOL_BYTES, limits, host_blocks)
    from penstock.runtime.cuda import CudaBackend

    budget = memory.budget()
    say(str(plan_run(engine, budget, limits)))
    return CudaBackend(engine, directory, budget, limits, host_blocks)


def open_loop(
    directory: Path,
    memory: Memory | None = None,
    tokenizer: Tokenizer | None = None,
    limits: RunLimits | None = None,
    engine: Engine | None = None,
    say: Say = _silent,
) -> Loop:
    """Load an engine and start its executor. `tokenizer` None: token ids only. `engine`: of that directory, where it
    was read and checked already.

    Raises EngineMismatch where the engine was compiled for another device or other software, ResourceError where memory
    does not suffice.
    """
    opened, asked = engine or store.load(directory), limits or RunLimits()
    chosen, host_blocks = asked.within(opened.profile), asked.host_blocks(opened)
    check_match(opened)
    target = asked.inter_token_latency_target
    if target is not None and (opened.encoder is not None or opened.reads_prefix):
        raise UnsupportedError(
            f"inter_token_latency_target={target} is not built yet for models with an encoder or prompts that see "
            f"themselves, whose runs no budget cuts; lower max_num_tokens instead, which bounds them"
        )
    pace = None if target is None else Pace(opened, target, store.timing(directory))

    def open_executor() -> Executor:
        if opened.besides and asked.enable_prefix_caching:
            say(f"prefixes are not found again: the model has state besides KV ({opened.besides})")
        backend = open_backend(opened, directory, memory or Memory(), chosen, say, host_blocks)
        return Executor(opened, backend, tokenizer, chosen, asked.enable_prefix_caching, pace)

    return Loop(open_executor)


def check_match(engine: Engine) -> None:
    """Raises EngineMismatch where the engine was compiled for another device or other software."""
    here = detect(engine.device.kind if engine.device.kind == "cpu" else "auto")
    versions = {name: v for name, v in software(here).items() if name not in COMPILES_ONLY}
    if reason := mismatch(engine, here, versions):
        raise EngineMismatch(
            f"{reason}; run `penstock build` here, or open it with LLM(), which selects its tactics anew"
        )
