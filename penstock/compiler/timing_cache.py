"""Timings kept between builds, in the user's cache directory: a later build of a like model times nothing twice."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from penstock.compiler.timing import Timing
from penstock.engine.device import Device
from penstock.engine.place import cache_root as cache_root


class TimingCache:
    """Timings by readable key, for one device and one set of software versions."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known = {} if path is None else _read(path)
        self.hits = 0

    @staticmethod
    def of(root: Path, device: Device, software: Mapping[str, str]) -> TimingCache:
        """The cache file of this device and software."""
        identity = json.dumps([asdict(device), dict(software)], sort_keys=True)
        name = f"{device.name.replace(' ', '-')}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"
        return TimingCache(root / "timings" / name)

    def get(self, key: str) -> Timing | None:
        timing = self._known.get(key)
        self.hits += timing is not None
        return timing

    def put(self, key: str, timing: Timing) -> None:
        """Keep a timing for this build; those that ran also for later ones, once saved."""
        self._known[key] = timing

    def save(self) -> None:
        """Write what was measured; another build's file is replaced whole, never half.

        Refusals are left out: a crash or a full memory may not happen again.
        """
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{secrets.token_hex(8)}.part")  # threads of one process build too
        part.write_text(json.dumps({k: asdict(t) for k, t in self._known.items() if t.ok}))
        part.replace(self.path)


def _read(path: Path) -> dict[str, Timing]:
    """The timings of a file. One that is missing or damaged has none: they are measured again, and it is replaced."""
    try:
        return {key: Timing(**timing) for key, timing in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
