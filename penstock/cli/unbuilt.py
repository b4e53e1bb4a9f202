"""Verbs of the public surface that are not built yet: they take any arguments and say so."""

from __future__ import annotations

from collections.abc import Callable

from penstock.unsupported import refuse

VERBS = {
    "quantize": "Quantise a checkpoint (not built yet).",
    "diff": "Compare two engines (not built yet).",
}
BENCHES = {
    "precision": "Formats beside each other (not built yet).",
    "lora": "With adapters (not built yet).",
}
ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True}


def verb(name: str) -> Callable[[], None]:
    """A verb that raises UnsupportedError with what to do instead."""

    def run() -> None:
        refuse(f"penstock {name}")

    return run
