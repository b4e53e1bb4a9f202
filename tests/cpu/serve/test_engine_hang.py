"""Steps that fail and one that never ends, by a plugin's tactic.

One bad step is its own requests' affair, a device that fails every step is given up, and while one hangs there are
beats, bad health, and then a report that shows where it stands.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from penstock.errors import ExecutorError
from penstock.serve.link import EngineDied
from penstock.serve.supervisor import Supervisor
from penstock.serve.wire import Submit

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = '''
"""take_rows by its reference, while there is no file `stand` or `fail` beside this one."""
import time
from pathlib import Path
from penstock.kernels import calls, registry
from penstock.kernels.tactic import Draft, Tactic, whole_call

STAND, FAIL = (Path(__file__).parent / name for name in ("stand", "fail"))


def stand_and_wait(call, given, results, sizes):
    if FAIL.exists():
        raise RuntimeError("a step failed on demand")
    while STAND.exists():
        time.sleep(0.01)
    return calls.reference(call, given, results, sizes)


calls.register("standing.rows", stand_and_wait)


class Standing(Tactic):
    op, name = "take_rows", "standing"

    def supports(self, site, sizes, device):
        return None

    def plan(self, site, sizes, device, config):
        return Draft((whole_call("standing.rows", site),))


registry.register(Standing())
'''


@pytest.fixture
def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    (tmp_path / "standing.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    arguments = {"device": "cpu", "cache_dir": str(tmp_path / "cache")}
    arguments |= {"plugins": ["standing"], "tactics": {"take_rows": "standing"}}
    return Supervisor(arguments, crash_dir=tmp_path / "crashes", hang_timeout=4.0, stall_timeout=1.0)


def run(supervisor: Supervisor, test: Callable[[Supervisor], Awaitable[None]]) -> None:
    async def opened() -> None:
        try:
            supervisor.start()
            await supervisor.ready()
            await test(supervisor)
        finally:
            await supervisor.stop()

    asyncio.run(opened())


def test_steps_that_fail(standing: Supervisor, tmp_path: Path) -> None:
    """One, and then all."""
    fail = tmp_path / "fail"

    async def failing(supervisor: Supervisor) -> None:
        async def one(name: str) -> None:
            await supervisor.link.submit(Submit(name, [5, 6], {"max_tokens": 2}, time.monotonic())).parts()

        fail.touch()
        with pytest.raises(ExecutorError, match="on demand"):
            await one("first")
        fail.unlink()
        await one("good")
        fail.touch()
        for i in range(5):
            with pytest.raises(ExecutorError, match="on demand"):
                await one(f"bad-{i}")
        while supervisor.link.state == "ready":
            await asyncio.sleep(0.05)
        fail.unlink()
        await supervisor.ready()
        assert supervisor.last_crash is not None
        assert "steps have failed, one after another" in json.loads(supervisor.last_crash.read_text())["stderr"]

    run(standing, failing)


@pytest.mark.long  # waits for a hang; engines that only pretend to be one hang in test_supervisor.py
def test_a_step_that_hangs(standing: Supervisor, tmp_path: Path) -> None:
    async def hanging(supervisor: Supervisor) -> None:
        new = Submit("stuck", [5, 6, 7], {"max_tokens": 900, "ignore_eos": True}, time.monotonic())
        reply = supervisor.link.submit(new)
        await reply.parts()
        (tmp_path / "stand").touch()
        stood = time.monotonic()
        while supervisor.healthy()[0]:
            await asyncio.sleep(0.05)
            assert time.monotonic() - stood < 4, "it was never unhealthy"
        assert "no step has ended" in supervisor.healthy()[1]
        beat = supervisor.link.beat
        assert beat is not None and time.monotonic() - beat.time < 1, "it beats still"
        with pytest.raises(EngineDied):
            while True:
                await asyncio.wait_for(reply.parts(), 15)
        assert 3.5 < time.monotonic() - stood < 10
        assert supervisor.last_crash is not None
        report = json.loads(supervisor.last_crash.read_text())
        assert "it hung" in report["reason"] and "stand_and_wait" in report["stacks"]
        assert [row["request"] for row in report["steps"][0]["rows"]] == ["stuck"]

    run(standing, hanging)
