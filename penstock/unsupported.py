"""The one table of names that parse and are not built yet, and what to do instead. Building a thing deletes its row."""

from __future__ import annotations

from typing import Final, NoReturn

from penstock.errors import UnsupportedError

# Sampling parameters, arguments and functions by their name, verbs as "penstock VERB".
UNSUPPORTED: Final[dict[str, str]] = {
    # LLM and build arguments
    "quantization": "quantised weights; use dtype 'bfloat16' or 'float16'",
    "quant_mode": "quantised weights; use dtype 'bfloat16' or 'float16'",
    "tensor_parallel_size": "more than one rank; use 1",
    "pipeline_parallel_size": "more than one pipeline stage; use 1",
    "tp_size": "running on more than one rank; use 1",
    "pp_size": "more than one pipeline stage; use 1",
    "lora_paths": "adapters; merge the adapter into the checkpoint first",
    "max_loras": "adapters; leave it out",
    "max_lora_rank": "adapters; leave it out",
    "lora_request": "adapters; leave it out for the base model",
    "lora_indices": "adapters; leave it out for the base model",
    "add_lora": "adapters; merge the adapter into the checkpoint first",
    "remove_lora": "adapters; there is none to remove",
    "/v1/load_lora_adapter": "adapters; merge the adapter into the checkpoint first",
    "/v1/unload_lora_adapter": "adapters; there is none to remove",
    "speculative": "speculative decoding; leave it out, the text is the same",
    # Verbs
    "penstock quantize": "quantising a checkpoint; build from the unquantised one",
    "penstock bench precision": "formats beside each other; run `penstock bench latency` with each --dtype",
    "penstock bench lora": "adapters; `penstock bench latency` measures the base model",
    "penstock diff": "comparing two engines; compare the output of `penstock inspect` on both",
}

_NO_VALUE: Final = object()


def refuse(name: str, value: object = _NO_VALUE) -> NoReturn:
    """Raise the UnsupportedError of a row of the table, naming the value where one was given."""
    given = name if value is _NO_VALUE else f"{name}={value!r}"
    raise UnsupportedError(f"{given} is not built yet: {UNSUPPORTED[name]}")


def require_default(name: str, value: object, default: object) -> None:
    """Refuse `name` if it is in the table and was given another value than its default (its neutral one)."""
    if name in UNSUPPORTED and value != default:
        refuse(name, value)
