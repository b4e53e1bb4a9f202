"""What the HTTP process may know of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock import LLM, __version__


def facts_of(llm: LLM, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """See `link`. kv_blocks, block_size: of its pools. roof, work: rates of the device and what a token takes, as in
    the manifest; empty where they are not known."""
    engine, executor = llm.engine, llm._loop.executor
    limits, spec = executor.scheduler.limits, engine.model_spec
    ends = llm.tokenizer.eos_token_ids if llm.tokenizer else ()
    return {
        "model": _name(arguments.get("model")), "directory": str(llm._text_home or llm.engine_dir),
        "vocab_size": engine.vocab_size, "max_seq_len": limits.max_seq_len, "max_batch_size": limits.max_batch_size,
        "max_num_tokens": limits.max_num_tokens, "eos": sorted({*engine.tokens.get("eos", ()), *ends}),
        "generation": dict(engine.tokens.get("generation", {})), "dtype": engine.format,
        "embeds": not spec.head, "embedding_size": 0 if spec.head else spec.result_size,
        "device": {"kind": engine.device.kind, "name": engine.device.name}, "version": __version__,
        "software": dict(engine.software), "kv_blocks": executor.kv.num_usable, "block_size": executor.kv.block_size,
        "roof": dict(engine.roof), "work": dict(engine.work),
    }  # fmt: skip


def _name(model: str | None) -> str:
    """A directory by its last part, so that nobody learns where it lies; a hub name as it is."""
    if model is None:
        return "bundled"
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
