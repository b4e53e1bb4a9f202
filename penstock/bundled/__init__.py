"""The model that comes with the package: a small Llama, its draft, three adapters and a held-out text.

All of it lies beside this file as ordinary Hugging Face and PEFT folders; README.md tells how it was made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from penstock.errors import InputError

AdapterName = Literal["scripture", "dictionary", "manual"]
ADAPTERS: tuple[AdapterName, ...] = ("scripture", "dictionary", "manual")

_HERE = Path(__file__).parent


def target() -> Path:
    """Hugging Face folder of the model itself: config, safetensors, tokenizer, chat template."""
    return _HERE / "target"


def draft() -> Path:
    """Hugging Face folder of a model under a quarter of the target's size, with the same tokenizer."""
    return _HERE / "draft"


def adapter(name: AdapterName) -> Path:
    """PEFT folder of a LoRA over `target()` that writes in one voice."""
    if name not in ADAPTERS:
        raise InputError(f"no bundled adapter {name!r}; choose one of {ADAPTERS}")
    return _HERE / "adapters" / name


def heldout() -> Path:
    """JSON lines `{"voice", "title", "text"}`: passages that no training has seen, about 200 kB of text."""
    return _HERE / "heldout.jsonl"
