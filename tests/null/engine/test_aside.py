"""Taking a directory's name: beside other threads and processes, and after ones that were killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.engine import aside, store


def killed() -> int:
    """The number of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def left(target: Path, kind: str, pid: int) -> Path:
    path = next(p for p in aside.names(target) if p.name.endswith(kind))
    path = path.with_name(re.sub(r"\.\d+\.", f".{pid}.", path.name, count=1))
    path.mkdir()
    (path / "file").write_text(kind)
    return path


def replace(target: Path, text: str) -> None:
    with store.replacing(target, "testing") as part:
        (part / "file").write_text(text)


def test_threads_that_write_one_directory_do_not_meet(tmp_path: Path) -> None:
    count = 8
    inside, errors = threading.Barrier(count, timeout=30), list[BaseException]()

    def write(index: int) -> None:
        try:
            for _ in range(10):
                with store.replacing(tmp_path / "engine", "testing") as part:
                    (part / "file").write_text(str(index))
                    inside.wait()  # so that all take the name at once
        except BaseException as error:
            errors.append(error)
            inside.abort()

    threads = [threading.Thread(target=write, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (tmp_path / "engine" / "file").read_text() in map(str, range(count))
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    target, dead = tmp_path / "engine", killed()
    gone = [left(target, kind, dead) for kind in ("part", "old", "part")]
    kept = [left(target, "part", os.getpid()), left(tmp_path / "engine2", "part", dead), tmp_path / ".engine.7.part"]
    kept[-1].mkdir(exist_ok=True)
    elsewhere = tmp_path / f".engine.{dead}.00000000.0123abcd.part"  # another host's, on a shared disk
    elsewhere.mkdir()
    replace(target, "new")
    replace(target, "newer")  # by now something stands where the old one was
    assert not any(p.exists() for p in gone) and all(p.exists() for p in (*kept, elsewhere))
    assert (target / "file").read_text() == "newer"


def test_an_only_copy_that_a_killed_process_put_aside_stays(tmp_path: Path) -> None:
    old = left(tmp_path / "engine", "old", killed())
    with pytest.raises(RuntimeError), store.replacing(tmp_path / "engine", "testing"):
        raise RuntimeError
    assert (old / "file").read_text() == "old" and not (tmp_path / "engine").exists()


def test_what_somebody_else_made_meanwhile_may_stay(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    with store.replacing(target, "testing", lambda part, there: there.exists()) as part:
        (part / "file").write_text("slow")
        replace(target, "quick")
    assert (target / "file").read_text() == "quick" and [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_what_was_replaced_does_not_come_back_while_another_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "engine", Path.rename
    replace(target, "old")

    def followed(self: Path, to: Path) -> Path:
        done = rename(self, to)
        if self.name.endswith(".part"):
            rename(target, tmp_path / "taken by the next one")
        return done

    monkeypatch.setattr(Path, "rename", followed)
    replace(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["taken by the next one"]
