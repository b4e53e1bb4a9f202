"""What a build is asked for, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.engine.device import Device
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.errors import OptionError
from penstock.formats import parse
from penstock.kernels.gpu import FP8
from penstock.models.config import stored_format
from penstock.spec.model import ModelSpec

FORMATS = {
    "float32": "f32", "f32": "f32", "fp32": "f32", "float": "f32",
    "float16": "f16", "f16": "f16", "fp16": "f16", "half": "f16",
    "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
TASKS = ("auto", "generate", "embed")
NARROW = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}
DEFAULT_SEQ_LEN = 8192  # tokens; longer on request, since every slot keeps its history and block table


def narrow() -> dict[str, str]:
    """What KV may be kept in besides the model's own type: ours, and the floats of plugins under their own names."""
    return NARROW | {name: name for name in plugins.registered("format") if parse(name).is_float}


@dataclass(frozen=True)
class BuildOptions:
    """Limits left at None take a default that fits the model and the device."""

    dtype: str = "auto"
    weights: str = "checkpoint"  # or "random"
    device: str = "auto"
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    block_size: int = 64
    pins: Mapping[str, str] = field(default_factory=dict)  # op -> the tactic that must run it; `!name`: must not
    cache_dir: Path | None = None
    kv_cache_dtype: str = "auto"  # the model's own
    task: str = "auto"  # "generate", or "embed"; auto: as the model's directory says

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise OptionError(f"{name}={value!r} is a {type(value).__name__}; give an integer")
        if not isinstance(self.dtype, str) or self.dtype not in ("auto", *FORMATS):
            raise OptionError(f"dtype={self.dtype!r} is not one of auto, {', '.join(FORMATS)}")
        if not isinstance(self.kv_cache_dtype, str) or self.kv_cache_dtype not in ("auto", *narrow(), *FORMATS):
            raise OptionError(
                f"kv_cache_dtype={self.kv_cache_dtype!r} is not one of auto, {', '.join((*narrow(), *FORMATS))}"
            )
        if self.task not in TASKS:
            raise OptionError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        if self.weights not in ("checkpoint", "random"):
            raise OptionError(f"weights={self.weights!r} is neither 'checkpoint' nor 'random'")

    def format(self, config: Mapping[str, Any], device: Device) -> str:
        """The number format of weights and activations: float32 on a CPU, the checkpoint's own on a GPU.

        Raises ConfigError where that is none of ours.
        """
        if self.dtype != "auto":
            return FORMATS[self.dtype]
        if device.kind == "cpu":
            return "f32"
        return stored_format(config)

    def kv_format(self, format: str, device: Device) -> str:
        """The number format of KV, where the model computes in `format`. Raises OptionError for one that is neither it
        nor narrower, and where the device does not convert it."""
        if self.kv_cache_dtype in NARROW:
            if device.kind == "cuda" and device.capability < FP8:
                raise OptionError(
                    f"kv_cache_dtype={self.kv_cache_dtype!r} needs compute capability {FP8 / 10} or above, and "
                    f"{device.name} has {device.capability / 10}; use 'auto'"
                )
            return NARROW[self.kv_cache_dtype]
        if self.kv_cache_dtype in narrow():
            return self.kv_cache_dtype
        if self.kv_cache_dtype != "auto" and FORMATS[self.kv_cache_dtype] != format:
            raise OptionError(
                f"kv_cache_dtype={self.kv_cache_dtype!r}, but the model computes in {format}; KV is kept in that type "
                f"('auto') or in 'fp8'"
            )
        return format

    def check_kv(self, engine: Engine, where: str) -> None:
        """Raises OptionError where `engine` keeps KV in another type than was asked for."""
        asked = self.kv_cache_dtype
        if asked != "auto" and {**FORMATS, **narrow()}[asked] != engine.kv_format:
            raise OptionError(
                f"kv_cache_dtype={asked!r}, but the engine in {where} keeps KV in {engine.kv_format}; leave it out, or "
                f"build an engine with that from the checkpoint"
            )

    def check_task(self, engine: Engine, where: str) -> None:
        """Raises OptionError where `engine` is for another task than was asked for."""
        if self.task not in ("auto", has := "generate" if engine.model_spec.head else "embed"):
            raise OptionError(
                f"task={self.task!r}, but the engine in {where} was built to {has}; leave it out, or build an engine "
                f"for that from the checkpoint"
            )

    def profile(self, spec: ModelSpec, device: Device) -> Profile:
        """Raises OptionError where a limit exceeds the model's or contradicts another."""
        seq_len = _given(self.max_seq_len, min(spec.max_position, DEFAULT_SEQ_LEN))
        if seq_len > spec.max_position:
            raise OptionError(
                f"max_seq_len={seq_len} exceeds the {spec.max_position} positions the model was made for; lower it"
            )
        batch = _given(self.max_batch_size, 64 if device.kind == "cuda" else 16)
        tokens = _given(self.max_num_tokens, max(batch, 8192 if device.kind == "cuda" else 512))
        rope = spec.request_rope
        return Profile(batch, tokens, seq_len, self.block_size, rope.dim // 2 if rope else 0)


def _given(value: int | None, default: int) -> int:
    """0 is a value: the profile refuses it."""
    return default if value is None else value
