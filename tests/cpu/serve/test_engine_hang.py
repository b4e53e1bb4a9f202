"""A step that never ends, by a plugin's tactic: beats go on, health turns, and the report shows where it stands."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from penstock.serve.link import EngineDied
from penstock.serve.supervisor import Supervisor
from penstock.serve.wire import Submit

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = '''
"""take_rows by its reference, as long as there is no file `stand` beside this one."""
import time
from pathlib import Path
from penstock.kernels import calls, registry
from penstock.kernels.tactic import Draft, Tactic, whole_call

STAND = Path(__file__).parent / "stand"


def stand_and_wait(call, given, results, sizes):
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


def test_a_hang_inside_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "standing.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    arguments = {"device": "cpu", "cache_dir": str(tmp_path / "cache")}
    arguments |= {"plugins": ["standing"], "tactics": {"take_rows": "standing"}}

    async def hanging() -> None:
        supervisor = Supervisor(arguments, crash_dir=tmp_path / "crashes", hang_timeout=4.0, stall_timeout=1.0)
        supervisor.start()
        await supervisor.ready()
        new = Submit("stuck", [5, 6, 7], {"max_tokens": 900, "ignore_eos": True}, time.monotonic())
        reply = supervisor.link.submit(new)
        await reply.parts()
        (tmp_path / "stand").touch()
        stood = time.monotonic()
        while supervisor.healthy()[0]:
            await asyncio.sleep(0.05)
            assert time.monotonic() - stood < 4, "it was never unhealthy"
        assert "no step has ended" in supervisor.healthy()[1]
        assert supervisor.link.beat is not None and time.monotonic() - supervisor.link.beat.time < 1, "it beats still"
        with pytest.raises(EngineDied):
            while True:
                await asyncio.wait_for(reply.parts(), 15)
        assert 3.5 < time.monotonic() - stood < 10
        assert supervisor.last_crash is not None
        report = json.loads(supervisor.last_crash.read_text())
        assert "it hung" in report["reason"] and "stand_and_wait" in report["stacks"]
        assert [row["request"] for row in report["steps"][0]["rows"]] == ["stuck"]
        await supervisor.stop()

    asyncio.run(hanging())
