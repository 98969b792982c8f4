"""The clock for what falls due, when the time of day jumps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from batch_app.clock import BELIEVED, DueClock, seconds_since_boot

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


class Machine:
    """Its time of day, and the seconds that have really passed."""

    def __init__(self) -> None:
        self.time_of_day, self.seconds = NOON, 50.0
        self.clock = DueClock(lambda: self.time_of_day, lambda: self.seconds)

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds
        self.time_of_day += timedelta(seconds=seconds)


def test_it_goes_with_the_time_of_day() -> None:
    machine = Machine()
    for _ in range(3):
        machine.pass_time(3600)
        assert machine.clock() == machine.time_of_day


@pytest.mark.parametrize("jump", [DAY, timedelta(minutes=5), BELIEVED])
def test_a_jump_ahead_makes_nothing_due_early(jump: timedelta) -> None:
    machine = Machine()
    machine.time_of_day += jump
    assert machine.clock() == NOON
    machine.pass_time(60)
    assert machine.clock() == NOON + timedelta(seconds=60)


def test_a_jump_back_makes_it_late_and_a_correction_right() -> None:
    machine = Machine()
    machine.time_of_day -= DAY
    machine.pass_time(60)
    assert machine.clock() == NOON - DAY + timedelta(seconds=60)
    machine.time_of_day += DAY
    assert machine.clock() == machine.time_of_day


def test_a_machine_that_began_without_a_clock_gets_one() -> None:
    machine = Machine()
    machine.time_of_day += 365 * DAY
    assert machine.clock() == machine.time_of_day
    machine.pass_time(60)
    machine.time_of_day += DAY
    assert machine.clock() == machine.time_of_day - DAY


def test_seconds_since_boot_never_go_back() -> None:
    readings = [seconds_since_boot() for _ in range(100)]
    assert readings == sorted(readings)
