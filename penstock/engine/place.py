"""Where engines, timings and compiled kernels are kept between builds."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(chosen: str | Path | None = None) -> Path:
    """The directory chosen, or `penstock` in the user's cache directory."""
    if chosen is not None:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"
