"""Names beside a directory: of the one that is being made to take its place, and of the one that was there.

A name says which process made it, so that what a killed one left behind can be told from what is being written.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

PART, OLD = "part", "old"


def names(target: Path) -> tuple[Path, Path]:
    """Of the fresh directory and of the one put aside: unique, also among the threads of a process."""
    mine = f"{os.getpid()}.{_home()}.{secrets.token_hex(4)}"
    part, old = (target.with_name(f".{target.name}.{mine}.{kind}") for kind in (PART, OLD))
    return part, old


def sweep(target: Path) -> None:
    """Remove what processes of this machine that have ended left beside `target`.

    What one of them put aside stays where nothing took its place: it may be the only copy.
    """
    for path, pid, kind in list(_left(target)):
        if not _runs(pid) and (kind == PART or target.exists()):
            shutil.rmtree(path, ignore_errors=True)


def _left(target: Path) -> Iterator[tuple[Path, int, str]]:
    """Each name of ours from this machine, with its process and kind."""
    form = re.compile(rf"{re.escape(f'.{target.name}.')}(\d{{1,9}})\.{_home()}\.[0-9a-f]{{8}}\.({PART}|{OLD})")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if found := form.fullmatch(path.name):
            yield path, int(found[1]), found[2]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _home() -> str:
    """Where process numbers mean the same: a host, and within it a container. A shared disk has names of several."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # no Linux
        space = 0
    return hashlib.sha256(f"{socket.gethostname()}/{space}".encode()).hexdigest()[:8]
