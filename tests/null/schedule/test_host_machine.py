"""The scheduler's state machine driven by plain seeds through what it seldom finds: long shared prefixes in small
pools, which go to the host's memory and come back while steps fail and requests are aborted."""

from __future__ import annotations

import random

from tests.null.schedule.test_scheduler_machine import SchedulerMachine

SEEDS, ACTIONS = 300, 150
WINDOWS = ((0, None), (0, None), (6, None), (0, 6), (5, 0), (0, 0))  # of one group of layers, or two


class Driven:
    """One run, from empty to empty."""

    def __init__(self, seed: int) -> None:
        self.draw, self.machine = random.Random(seed), SchedulerMachine()
        draw = self.draw.randint
        self.failing = self.draw.choice((0.0, 0.03, 0.1))
        self.machine.start(
            slots=draw(1, 4), spare=draw(0, 20), blocks=(draw(6, 20), draw(5, 16)), in_flight=draw(1, 3), reuse=True,
            share=self.draw.choice((None, None, 2)), windows=self.draw.choice(WINDOWS),
            host=self.draw.choice((1, 2, 3, 5, 9, 30)),
        )  # fmt: skip

    def run(self) -> None:
        for _ in range(ACTIONS):
            self.act(self.draw.random())
            self.machine.books_balance()
        self.machine.teardown()

    def act(self, chance: float) -> None:
        machine, flight = self.machine, self.machine.flight
        if chance < self.failing:
            if flight:
                machine.fail(newest=self.draw.random() < 0.4)
        elif chance < 0.14:
            self.arrive()
        elif chance < 0.17:
            self.abort()
        elif chance < 0.6:
            if machine.scheduler.can_schedule:
                machine.schedule()
        elif flight:
            machine.retire()

    def arrive(self) -> None:
        draw, pick, machine = self.draw.randint, self.draw.choice, self.machine
        if self.draw.random() < 0.15:
            machine.arrive_beams(
                prompt=draw(5, 14), kind=draw(0, 2), max_tokens=draw(1, 9), width=draw(1, 3), penalty=1.0, early=False,
                priority=draw(0, 1),
            )  # fmt: skip
        else:
            machine.arrive(
                prompt=draw(5, 24), kind=draw(0, 2), max_tokens=draw(1, 12), stop_at=pick((None, 2, 5)),
                priority=draw(0, 1), salt=pick((b"", b"", b"other")), flags=pick(((), (), (), ("lockstep",))),
            )  # fmt: skip

    def abort(self) -> None:
        if live := [name for name, truth in self.machine.truths.items() if not truth.ends]:
            event = self.machine.scheduler.abort(self.draw.choice(live))
            assert event is not None
            self.machine.hear_end(event)


def test_what_comes_back_from_the_host_is_what_went_out() -> None:
    restored = 0
    for seed in range(SEEDS):
        driven = Driven(seed)
        try:
            driven.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        restored += driven.machine.kv.num_restored
    assert restored > SEEDS
