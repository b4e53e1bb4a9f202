"""What the key of an engine in the cache is made of. A key leaves out where the engine is put."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.engine import store
from penstock.engine.device import Device
from penstock.ir.op import vocabulary
from penstock.kernels import registry, tactic
from penstock.kernels.device import software
from penstock.models.checkpoint import Checkpoint
from penstock.text.files import text_files


def digest(facts: object) -> str:
    """16 hexadecimal digits for facts that JSON can write."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def tensor_facts(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of each file; what is in them is left out, since it may be hundreds of GB."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def text_facts(directory: Path) -> dict[str, str]:
    """The content of tokenizer, chat templates and generation settings, which an engine carries with it."""
    return {str(f.relative_to(directory)): store.fingerprint(f) for f in text_files(directory)}


def compiler_facts(device: Device) -> Mapping[str, Any]:
    """Device and software, plugins, every tactic that may compete, and the source of every kernel."""
    tactics = [(t.op, t.name, t.version) for op in vocabulary() for t in registry.tactics(op.name)]
    return {
        "device": asdict(device),
        "software": dict(software(device)),
        "plugins": plugins.identities(),
        "tactics": tactics,
        "kernels": tactic.source_hash(tactic.__name__),
    }
