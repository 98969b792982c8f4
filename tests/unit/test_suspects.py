"""The search for the request that kills the engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.suspects import Suspects


@dataclass
class Batch:
    """Requests on an engine that dies of some of them, with a window; counts its deaths."""

    num_requests: int
    window: int
    poisons: set[int]
    path: Path
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    deaths_by_hand: int = 0
    worker_deaths: int = 0
    num_deaths: int = 0
    done: set[int] = field(default_factory=set)
    found: list[int] = field(default_factory=list)

    def run(self) -> None:
        suspects = Suspects()
        while True:
            if self.worker_deaths and self.chance.random() < 0.3:
                self.worker_deaths -= 1
                suspects = Suspects.load(self.path)
            suspects.forget(self.done.__contains__)
            self.found += suspects.guilty
            self.done |= set(suspects.guilty)
            todo = [n for n in range(self.num_requests) if n not in self.done]
            if not todo:
                return
            open_ = [n for n in todo if n not in suspects.numbers]
            survivors = self.live(open_ or suspects.next_group(set(todo)))
            if survivors is not None:
                self.num_deaths += 1
                suspects.died(survivors, beside=bool(open_))
                suspects.save(self.path)

    def live(self, group: list[int]) -> list[int] | None:
        """One life; who was in flight at its end, None when all are done."""
        upcoming, in_flight = list(group), []
        while upcoming or in_flight:
            while upcoming and len(in_flight) < self.window:
                in_flight.append(upcoming.pop(0))
            if self.deaths_by_hand and self.chance.random() < 0.05:
                self.deaths_by_hand -= 1
                return in_flight
            runnable = [n for n in in_flight if n not in self.poisons]
            if self.poisons & set(in_flight) and (not runnable or self.chance.random() < 0.3):
                return in_flight
            if runnable:
                chosen = self.chance.choice(runnable)
                in_flight.remove(chosen)
                self.done.add(chosen)
        return None


@given(
    num_requests=st.integers(1, 120),
    window=st.integers(1, 40),
    poisons=st.sets(st.integers(0, 119), max_size=4),
    seed=st.integers(0, 1000),
    worker_deaths=st.integers(0, 5),
)
def test_the_poisonous_are_found_and_nobody_else(
    tmp_path_factory: pytest.TempPathFactory,
    num_requests: int,
    window: int,
    poisons: set[int],
    seed: int,
    worker_deaths: int,
) -> None:
    path = tmp_path_factory.mktemp("suspects") / "suspects.json"
    poisons = {number for number in poisons if number < num_requests}
    batch = Batch(
        num_requests, window, poisons, path, random.Random(seed), worker_deaths=worker_deaths
    )
    batch.run()
    assert sorted(batch.found) == sorted(poisons)
    assert batch.done == set(range(num_requests))
    # One death to become a suspect, one for each halving, two alone; one more for a group's rest.
    assert batch.num_deaths <= len(poisons) * (window.bit_length() + 4)


@given(seed=st.integers(0, 1000), window=st.integers(2, 40))
def test_a_death_by_hand_makes_nobody_guilty(
    tmp_path_factory: pytest.TempPathFactory, seed: int, window: int
) -> None:
    path = tmp_path_factory.mktemp("suspects") / "suspects.json"
    batch = Batch(100, window, set(), path, random.Random(seed), deaths_by_hand=1)
    batch.run()
    assert batch.found == []
    assert batch.num_deaths <= 1


def test_two_deaths_alone_make_guilty_and_one_does_not() -> None:
    suspects = Suspects()
    suspects.died([7], beside=True)
    assert (suspects.guilty, suspects.next_group({7})) == ([], [7])
    suspects.died([7], beside=False)
    assert (suspects.guilty, suspects.next_group({7})) == ([7], [])


def test_who_gets_an_answer_is_cleared_of_a_death_alone() -> None:
    suspects = Suspects()
    suspects.died([7], beside=True)
    suspects.forget({7}.__contains__)
    assert (len(suspects), suspects.guilty) == (0, [])


def test_a_guilty_one_stays_guilty_until_its_result_is_written(tmp_path: Path) -> None:
    path = tmp_path / "suspects.json"
    suspects = Suspects()
    suspects.died([7], beside=True)
    suspects.died([7], beside=False)
    suspects.save(path)
    again = Suspects.load(path)
    assert again.guilty == [7]
    again.forget({7}.__contains__)
    again.save(path)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"groups": 3}', b'{"groups": [["x"]]}', b"\xff"])
def test_a_file_that_makes_no_sense_is_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "suspects.json"
    path.write_bytes(content)
    assert len(Suspects.load(path)) == 0


def test_both_halves_stay_suspects_each_among_themselves() -> None:
    suspects = Suspects()
    everyone = set(range(8))
    suspects.died(range(8), beside=True)
    suspects.died(range(6), beside=False)  # 6 and 7 weren't in flight yet
    assert suspects.numbers == list(range(8))
    for group in ([0, 1, 2], [3, 4, 5], [6, 7]):
        assert suspects.next_group(everyone) == group
        suspects.forget(set(group).__contains__)
    assert suspects.next_group(everyone) == []
