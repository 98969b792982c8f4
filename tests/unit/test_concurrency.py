"""How many requests a server gets at a time, against simulated servers."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from batch_app.engine.concurrency import START, Concurrency


@dataclass
class Simulated:
    """A server that makes a token of each request it has in a step. A step takes longer with more
    than `capacity` of them. Above `most` at a time it refuses. `num_busy`: so many are there to be
    sent at a time."""

    capacity: int = 1_000_000
    most: int = 1_000_000
    num_busy: int = 1_000_000
    windows: list[int] = field(default_factory=list)

    def run(self, limit: Concurrency, num_answers: int) -> None:
        dice, now, step = random.Random(1), 0.0, 0
        running: list[tuple[int, int, float, int, int]] = []  # by the step they end with
        sent = answered = 0
        while answered < num_answers:
            while len(running) < min(limit.window, self.num_busy):
                sent += 1
                if len(running) >= self.most:
                    limit.refused(sent_at=now, now=now)
                    break
                tokens = dice.randint(50, 150)
                heapq.heappush(running, (step + tokens, sent, now, tokens, len(running) + 1))
            slowness = max(1.0, len(running) / self.capacity)
            end, _, sent_at, tokens, num = heapq.heappop(running)
            now += 0.01 * (end - step) * slowness
            step = end
            limit.answered(sent_at=sent_at, now=now, tokens=tokens, num_in_flight=num)
            answered += 1
            self.windows.append(limit.window)

    def usual(self) -> float:
        """The middle window of the second half."""
        rest = sorted(self.windows[len(self.windows) // 2 :])
        return rest[len(rest) // 2]


def test_a_server_with_room_gets_the_most() -> None:
    server = Simulated()
    server.run(Concurrency(1, 256), 5000)
    assert server.windows[0] == START
    assert server.usual() == 256


@pytest.mark.parametrize("capacity", [16, 32, 64])
def test_one_that_only_makes_more_wait_gets_what_it_can_do(capacity: int) -> None:
    server = Simulated(capacity=capacity)
    server.run(Concurrency(1, 1024), 20_000)
    assert capacity / 2 <= server.usual() <= 2 * capacity


def test_one_request_after_the_other_is_not_crowded() -> None:
    server = Simulated(capacity=1)
    server.run(Concurrency(1, 1024), 5000)
    assert server.usual() <= 2 * START


@pytest.mark.parametrize("most", [2, 20, 100])
def test_one_that_refuses_gets_about_as_many_as_it_takes(most: int) -> None:
    server = Simulated(most=most)
    server.run(Concurrency(1, 1024), 20_000)
    assert most / 2 <= server.usual() <= most + 1


def test_refusals_of_what_was_sent_together_count_once() -> None:
    limit = Concurrency(1, 256)
    for _ in range(8):
        limit.refused(sent_at=1.0, now=2.0)
    assert limit.window == int(0.7 * START)
    limit.refused(sent_at=2.5, now=3.0)
    assert limit.window < int(0.7 * START)


def test_it_stays_between_its_bounds() -> None:
    limit = Concurrency(3, 5)
    assert limit.window == 5
    for at in range(20):
        limit.refused(sent_at=float(at), now=float(at))
    assert limit.window == 3


def test_with_little_to_do_nothing_is_learned() -> None:
    server = Simulated(num_busy=3)
    limit = Concurrency(1, 256)
    server.run(limit, 2000)
    assert limit.window == START
