"""Which request goes to which replica: on replicas made of numbers, at their own paces."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.engine.base import EngineRequest, Outcome
from batch_app.engine.dispatch import MAX_LOSSES, Dispatch, window_of

CHAT = "/v1/chat/completions"


def request(number: int, shared: int = 0) -> EngineRequest:
    return EngineRequest(number, CHAT, b"{}", shared)


def in_groups(num_groups: int, size: int, *, system: int = 0) -> list[EngineRequest]:
    """Groups of `size` requests that share 20 marks, all of them `system` marks."""
    return [
        request(group * size + place, 20 if place else system)
        for group in range(num_groups)
        for place in range(size)
    ]


def answers(numbers: list[int]) -> list[Outcome]:
    return [Outcome(number, 200, b"{}") for number in numbers]


@dataclass
class Cluster:
    """Replicas that finish so many requests a tick; the runner refills what is in hand."""

    paces: dict[int, int]
    window: int = 8
    in_hand: int = 64
    poisons: frozenset[int] = frozenset()
    dispatch: Dispatch = field(default_factory=Dispatch)
    has: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ran_on: dict[int, int] = field(default_factory=dict)
    num_runs: Counter[int] = field(default_factory=Counter)
    guilty: list[int] = field(default_factory=list)
    num_deaths: int = 0

    def __post_init__(self) -> None:
        for key in self.paces:
            self.dispatch.open(key, self.window)

    def run(self, requests: list[EngineRequest], max_ticks: int = 100_000) -> int:
        """Until all have an answer. Returns the ticks that took."""
        upcoming, left = list(reversed(requests)), len(requests)
        ticks = 0
        while left:
            ticks += 1
            assert ticks < max_ticks
            in_hand = self.dispatch.num_waiting + self.dispatch.num_in_flight
            room = min(self.in_hand - in_hand, len(upcoming))
            self.dispatch.add([upcoming.pop() for _ in range(room)])
            for key in list(self.paces):
                left -= self.tick(key)
        assert not self.dispatch.num_in_flight + self.dispatch.num_waiting
        return ticks

    def tick(self, key: int) -> int:
        """Returns how many requests are done with, by answer or verdict."""
        for one in self.dispatch.take(key):
            self.has[key].append(one.number)
            self.num_runs[one.number] += 1
        assert len(self.has[key]) <= self.window
        if self.poisons & set(self.has[key]):
            self.num_deaths += 1
            self.lose(key, by_engine=True)
            found = self.dispatch.take_guilty()
            self.guilty += found
            return len(found)
        finished, self.has[key] = self.has[key][: self.paces[key]], self.has[key][self.paces[key] :]
        assert len(self.dispatch.finished(key, answers(finished))) == len(finished)
        for number in finished:
            assert number not in self.ran_on
            self.ran_on[number] = key
        return len(finished)

    def lose(self, key: int, *, by_engine: bool) -> None:
        """Another one comes in its place."""
        self.has[key] = []
        self.dispatch.lost(key, by_engine=by_engine)
        self.dispatch.open(key, self.window)


def test_a_replica_has_enough_to_go_on_with_and_little_more() -> None:
    assert [window_of(seqs) for seqs in (1, 4, 16, 256, 1024)] == [2, 8, 24, 320, 1280]


def test_groups_stay_on_one_replica() -> None:
    cluster = Cluster(paces=dict.fromkeys(range(4), 2), window=8, in_hand=128)
    cluster.run(in_groups(100, 10, system=2))
    places = Counter(
        len({cluster.ran_on[group * 10 + place] for place in range(10)}) for group in range(100)
    )
    assert places[1] >= 85  # by chance: next to none
    assert places[1] + places[2] >= 97


def test_a_group_that_is_everything_is_shared_out() -> None:
    cluster = Cluster(paces=dict.fromkeys(range(4), 2), window=8, in_hand=64)
    ticks = cluster.run(in_groups(1, 800))
    assert ticks <= 800 / 8 + 4
    assert Counter(cluster.ran_on.values()).keys() == set(range(4))


def test_who_is_fast_gets_more() -> None:
    cluster = Cluster(paces={0: 1, 1: 3}, window=8, in_hand=32)
    ticks = cluster.run(in_groups(200, 4))
    ran = Counter(cluster.ran_on.values())
    assert 2.7 < ran[1] / ran[0] < 3.3
    assert ticks <= 800 / 4 + 5


def test_a_stretch_is_worked_through_in_the_order_of_the_plan() -> None:
    dispatch = Dispatch()
    dispatch.open(0, 5)
    dispatch.add([request(number) for number in range(12)])
    seen = []
    while taken := dispatch.take(0):
        seen += [one.number for one in taken]
        dispatch.finished(0, answers([one.number for one in taken]))
    assert seen == list(range(12))


def test_what_a_lost_replica_had_comes_before_what_others_have_waiting() -> None:
    dispatch = Dispatch()
    dispatch.open(0, 4)
    dispatch.open(1, 4)
    dispatch.add([request(number) for number in range(40)])
    lost = [one.number for one in dispatch.take(0)]
    dispatch.take(1)
    dispatch.lost(0, by_engine=False)
    dispatch.open(2, 4)
    assert [one.number for one in dispatch.take(2)] == lost
    assert dispatch.num_waiting + dispatch.num_in_flight == 40


def test_a_request_under_which_replicas_are_lost_again_and_again_waits_for_the_others() -> None:
    dispatch = Dispatch()
    dispatch.add([request(1)])
    for key in range(MAX_LOSSES):
        dispatch.open(key, 4)
        assert [one.number for one in dispatch.take(key)] == [1]
        dispatch.lost(key, by_engine=False)
    dispatch.open(9, 4)
    dispatch.add([request(2)])
    assert [one.number for one in dispatch.take(9)] == [2]
    dispatch.finished(9, answers([2]))
    assert [one.number for one in dispatch.take(9)] == [1]
    dispatch.finished(9, answers([1]))
    assert dispatch.num_waiting == dispatch.num_in_flight == 0


def test_the_one_that_kills_is_found_and_all_others_are_answered() -> None:
    cluster = Cluster(
        paces=dict.fromkeys(range(3), 2), window=16, in_hand=64, poisons=frozenset((100, 400))
    )
    cluster.run(in_groups(50, 10))
    assert sorted(cluster.guilty) == [100, 400]
    assert set(cluster.ran_on) == set(range(500)) - {100, 400}
    assert cluster.num_deaths <= 2 * (4 + 3)  # log2(16) halvings, and twice alone


def test_a_request_whose_nodes_are_always_lost_is_guilty_at_last() -> None:
    dispatch = Dispatch()
    dispatch.add([request(1), request(2)])
    num_lost = 0
    while not dispatch.num_guilty:
        dispatch.open(num_lost, 1)
        taken = [one.number for one in dispatch.take(num_lost)]
        if taken == [2]:
            dispatch.finished(num_lost, answers(taken))
            dispatch.give_back(num_lost)
        else:
            dispatch.lost(num_lost, by_engine=False)
        num_lost += 1
        assert num_lost < 20
    assert dispatch.take_guilty() == [1]
    assert dispatch.num_waiting == dispatch.num_in_flight == 0


def test_a_cancelled_request_is_told_to_its_replica_and_its_answer_is_nobodys() -> None:
    dispatch = Dispatch()
    dispatch.open(0, 2)
    dispatch.add([request(number) for number in range(6)])
    dispatch.take(0)
    assert dispatch.forget([0, 4, 99]) == {0: [0]}
    assert dispatch.num_waiting == 3
    assert [one.number for one in dispatch.finished(0, answers([0, 1]))] == [1]
    assert [one.number for one in dispatch.take(0)] == [2, 3]


def test_work_that_comes_after_a_pause_finds_a_replica() -> None:
    dispatch = Dispatch()
    dispatch.open(0, 4)
    dispatch.open(1, 4)
    for start in range(0, 30, 3):
        dispatch.add([request(number) for number in range(start, start + 3)])
        for key in (start % 2, 1 - start % 2):
            numbers = [one.number for one in dispatch.take(key)]
            dispatch.finished(key, answers(numbers))
        assert dispatch.num_waiting == 0


@pytest.mark.parametrize("ends_in_order", [True, False])
def test_a_replica_that_ends_leaves_its_stretch_to_others(ends_in_order: bool) -> None:
    dispatch = Dispatch()
    dispatch.open(0, 1)
    dispatch.add([request(number) for number in range(5)])
    (first,) = dispatch.take(0)
    if ends_in_order:
        dispatch.finished(0, answers([first.number]))
        dispatch.give_back(0)
    else:
        dispatch.lost(0, by_engine=False)
    dispatch.add([request(5)])
    dispatch.open(1, 10)
    expected = {1, 2, 3, 4, 5} | (set() if ends_in_order else {0})
    assert {one.number for one in dispatch.take(1)} == expected


@given(st.integers(0, 10_000))
def test_whatever_happens_each_request_has_one_end(seed: int) -> None:
    chance = random.Random(seed)
    paces = {key: chance.randint(1, 4) for key in range(chance.randint(1, 5))}
    count = chance.randint(1, 200)
    poisons = frozenset(chance.sample(range(count), min(count, chance.randint(0, 2))))
    cluster = Cluster(
        paces, window=chance.randint(1, 12), in_hand=chance.randint(1, 80), poisons=poisons
    )
    requests = [request(number, chance.choice((0, 2, 20))) for number in range(count)]
    losses = chance.randint(0, 10)
    tick = cluster.tick

    def tick_or_lose(key: int) -> int:
        nonlocal losses
        if losses and chance.random() < 0.05:
            losses -= 1
            cluster.lose(key, by_engine=chance.random() < 0.3)
            cluster.guilty += (found := cluster.dispatch.take_guilty())
            return len(found)
        return tick(key)

    cluster.tick = tick_or_lose  # type: ignore[method-assign]
    cluster.run(requests)
    assert set(cluster.ran_on) | set(cluster.guilty) == set(range(count))
    assert not set(cluster.ran_on) & set(cluster.guilty)
    assert poisons <= set(cluster.guilty)
