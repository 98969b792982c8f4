"""Leases, seen from outside: only a count that stands still ends one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batch_app.store.lease_watch import Lease, LeaseWatch


class Seconds:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lease(heartbeats: int, epoch: int = 1, batch_id: str = "b") -> Lease:
    return Lease(batch_id, epoch, heartbeats, lease_s=30.0)


def test_a_count_that_stands_still_for_the_lease_is_over() -> None:
    seconds = Seconds()
    watch = LeaseWatch(seconds)
    assert watch.run_out([lease(4)]) == []
    seconds.now = 30.0
    assert watch.run_out([lease(4)]) == []
    seconds.now = 30.1
    assert watch.run_out([lease(4)]) == [lease(4)]


def test_a_heartbeat_or_another_claim_begins_it_anew() -> None:
    seconds = Seconds()
    watch = LeaseWatch(seconds)
    for heartbeats, epoch in ((4, 1), (5, 1), (5, 2)):
        watch.run_out([lease(heartbeats, epoch)])
        seconds.now += 29.0
        assert watch.run_out([lease(heartbeats, epoch)]) == []


def test_what_was_not_looked_at_for_long_is_not_over() -> None:
    seconds = Seconds()
    watch = LeaseWatch(seconds)
    watch.run_out([lease(4)])
    seconds.now = 1e6
    assert watch.run_out([lease(5)]) == []
    assert watch.run_out([]) == []
    seconds.now = 2e6
    assert watch.run_out([lease(5)]) == [], "a lease that was gone meanwhile is a new one"


@given(
    beats=st.lists(st.floats(0.1, 29.0), min_size=1, max_size=20),
    looks=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=20),
)
def test_a_holder_that_beats_in_time_is_never_believed_gone(
    beats: list[float], looks: list[float]
) -> None:
    seconds = Seconds()
    watch = LeaseWatch(seconds)
    moments = sorted(
        [(sum(beats[: n + 1]), "beat") for n in range(len(beats))]
        + [(sum(looks[: n + 1]), "look") for n in range(len(looks))]
    )
    heartbeats = 0
    for moment, what in moments:
        if moment > sum(beats):
            break
        seconds.now = moment
        if what == "beat":
            heartbeats += 1
        else:
            assert watch.run_out([lease(heartbeats)]) == []
