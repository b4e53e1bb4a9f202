"""What a model's files say about generating: which ids end a text, and the sampling defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.text.files import read_json


def generation_facts(directory: Path) -> dict[str, Any]:
    """{"eos": ids, "generation": generation_config.json's content}; both empty where the files are silent."""
    generation = read_json(directory / "generation_config.json")
    config = read_json(directory / "config.json")
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    eos = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return {"eos": eos, "generation": generation}
