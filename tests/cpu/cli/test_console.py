"""Progress where there is a terminal and where there is none; how numbers read; the roof's arithmetic."""

from __future__ import annotations

import io

import pytest

from penstock.cli.console import Progress, amount, duration, table
from penstock.engine.device import CPU
from penstock.kernels import roof
from penstock.kernels.compile import instruction_of

BUILD = [
    ("read", 0, 0), ("read", 1, 1), ("select", 0, 0), ("time", 1, 0), ("time", 2, 0), ("select", 1, 1),
    ("weights", 0, 0), ("weights", 40, 100), ("weights", 100, 100), ("weights", 1, 1), ("ready", 1, 1),
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> tuple[Progress, str]:
    monkeypatch.setattr("sys.stderr", stream)
    with Progress() as progress:
        for event in BUILD:
            progress(*event)
    return progress, stream.getvalue()


def test_a_pipe_gets_a_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, text = shown(monkeypatch, io.StringIO())
    lines = [line.split(":")[0] for line in text.splitlines()]
    assert lines == ["read", "select", "weights", "ready"]
    assert set(progress.seconds()) == {"read", "select", "weights", "ready"} and "\x1b" not in text


def test_a_sentence_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Progress()("selecting tactics anew: another GPU", 0, 0)
    assert capsys.readouterr().err == "selecting tactics anew: another GPU\n"


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    _, text = shown(monkeypatch, Terminal())
    assert "weights" in text and "100 %" in text and "..." not in text


def test_a_long_stage_speaks_up_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for done in range(30):
        now[0] += 1.0
        progress("weights", done, 100)
    assert [line for line in capsys.readouterr().err.splitlines() if " of 100" in line] == [
        "weights: 11 of 100 after 11 s", "weights: 22 of 100 after 22 s",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.54 kB"), (15.0e9, "15 GB"), (4.43e12, "4.43 TB"), (5e15, "5000 TB")],
)
def test_amounts_have_three_digits(value: float, text: str) -> None:
    assert amount(value) == text


def test_durations_and_tables() -> None:
    assert [duration(x) for x in (2.5, 0.0034, 3.4e-7)] == ["2.5 s", "3.4 ms", "0.34 us"]
    assert table([("a", "bb"), ("ccc", "d")]) == "  a    bb\n  ccc  d"


def test_a_step_takes_the_longer_of_bytes_and_operations() -> None:
    rates = roof.Roof(read_bytes_per_s=100.0, flops_per_s=10.0)
    assert (rates.seconds(50, 1), rates.seconds(1, 50)) == (0.5, 5.0)


def test_the_roof_of_this_cpu_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "CPU_BUFFER", 64 << 20)
    monkeypatch.setattr(roof, "CPU_SIDE", 256)
    here = roof.measure(CPU)
    assert 1e8 < here.read_bytes_per_s < 1e12 and 1e8 < here.flops_per_s < 1e14


def test_the_instruction_is_read_from_the_ptx() -> None:
    assert instruction_of("  wgmma.mma_async.sync.aligned.m64n128k16 ...") == "wgmma"
    assert instruction_of("  mma.sync.aligned.m16n8k16 ...") == "mma"
    assert instruction_of("  fma.rn.f32 %f1, %f2, %f3, %f4;") == "fma"
