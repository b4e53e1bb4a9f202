"""The scheduler under simulated load, in short; tests/long has a million steps of it."""

from __future__ import annotations

from tests.long.simulator import simulate


def test_twenty_thousand_steps() -> None:
    found = simulate(seed=7, simulations=40, steps=500)
    assert found.steps >= 20_000
    assert (
        min(
            found.refused, found.preemptions, found.reused_tokens, found.failed_steps, found.most_overtaken, found.mixed
        )
        > 0
    )
    assert found.restored > 0
    assert set(found.ends) == {"length", "stop", "abort", "error"}
    assert set(found.kinds) == {"plain", "lockstep", "scores", "beams"}
