"""What the long tests find is kept under out/long, a JSON file each, with commit and environment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from penstock.bench import records
from penstock.engine.device import CPU

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "long"


def write(name: str, **found: Any) -> Path:
    """Write out/long/NAME.json; an older one is replaced, since it says of which commit it is."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    facts = {
        "commit": records.commit(),
        "when": records.now(),
        "environment": {**records.environment(CPU), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({**found, **facts}, indent=1) + "\n", encoding="utf-8")
    return path
