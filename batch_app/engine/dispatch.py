"""Which request goes to which replica. Pure: knows no cluster and no clock.

Requests come in the order of the plan, in which like stands beside like. Each replica works through
a *stretch* of that order. One that has nothing left takes the further half of the longest stretch,
cut where the requests on both sides share the least: so prompts that begin alike stay on one
replica, whoever is fast gets more, and a group is split only where a replica would stand idle.

What a lost replica had in flight comes first again, on others. Where its engine died of something,
the requests it had become suspects (`batch_app.suspects`): they run last, a group alone on a
replica, until the one that kills is found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from batch_app.engine.base import EngineRequest, Outcome
from batch_app.suspects import Suspects

#: Nodes that may be lost under a request before it is a suspect, too.
MAX_LOSSES = 3
#: Of a stretch, how much stays on either side of a cut, at the least.
_LEAST_SHARE = 8


def window_of(max_num_seqs: int) -> int:
    """How many requests a replica has at a time: what it runs, and enough to go on with while its
    answers travel."""
    return min(2 * max_num_seqs, max_num_seqs + max(8, max_num_seqs // 4))


@dataclass(slots=True, eq=False)
class _Replica:
    window: int
    stretch: deque[EngineRequest] = field(default_factory=deque)
    in_flight: dict[int, EngineRequest] = field(default_factory=dict)
    #: It has suspects, and nothing beside them.
    is_trying: bool = False


class Dispatch:
    """Replicas are numbers of the caller's choice."""

    def __init__(self) -> None:
        self._replicas: dict[int, _Replica] = {}
        self._free: deque[deque[EngineRequest]] = deque()  # stretches that nobody works on
        self._tail: deque[EngineRequest] | None = None  # where the order goes on
        self._suspects = Suspects()
        self._suspected: dict[int, EngineRequest] = {}  # those that wait, by number
        self._losses: dict[int, int] = {}
        self._num_waiting = 0

    # -- requests ------------------------------------------------------------------------------

    def add(self, requests: Iterable[EngineRequest]) -> None:
        """The next ones of the order."""
        if self._tail is None:
            self._tail = deque()
            self._free.append(self._tail)
        before = len(self._tail)
        self._tail.extend(requests)
        self._num_waiting += len(self._tail) - before

    def forget(self, numbers: Collection[int]) -> dict[int, list[int]]:
        """Returns those that replicas have in flight, by replica: they are to be told."""
        gone = frozenset(numbers)
        for stretch in self._stretches():
            kept = [request for request in stretch if request.number not in gone]
            self._num_waiting -= len(stretch) - len(kept)
            stretch.clear()
            stretch.extend(kept)
        self._clear(gone)
        told: dict[int, list[int]] = {}
        for key, replica in self._replicas.items():
            found = [number for number in replica.in_flight if number in gone]
            for number in found:
                del replica.in_flight[number]
            if found:
                told[key] = found
        return told

    @property
    def num_waiting(self) -> int:
        """Without a replica."""
        return self._num_waiting + len(self._suspected)

    @property
    def num_in_flight(self) -> int:
        return sum(len(replica.in_flight) for replica in self._replicas.values())

    @property
    def longest_search(self) -> int:
        """How often an engine may die, at most, before one of the suspects is found guilty."""
        return self._suspects.longest_search

    # -- replicas ------------------------------------------------------------------------------

    def open(self, key: int, window: int) -> None:
        """A replica is ready for so many requests at a time."""
        self._replicas[key] = _Replica(window)

    def has(self, key: int) -> int:
        """How many requests it has in flight."""
        return len(self._replicas[key].in_flight)

    def take(self, key: int) -> list[EngineRequest]:
        """What this replica is to get now, in this order."""
        replica = self._replicas[key]
        if replica.is_trying:
            if replica.in_flight:
                return []
            replica.is_trying = False
        taken: list[EngineRequest] = []
        while (room := replica.window - len(replica.in_flight)) > 0:
            if not replica.stretch and not self._find_work(replica):
                break
            some = [replica.stretch.popleft() for _ in range(min(room, len(replica.stretch)))]
            self._num_waiting -= len(some)
            replica.in_flight.update((request.number, request) for request in some)
            taken += some
        if not taken and not replica.in_flight and self._suspected:
            for number in self._suspects.next_group(self._suspected.keys()):
                taken.append(self._suspected.pop(number))
            replica.in_flight = {request.number: request for request in taken}
            replica.is_trying = bool(taken)
        return taken

    def finished(self, key: int, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Those of these outcomes that somebody waits for."""
        in_flight = self._replicas[key].in_flight
        wanted = [one for one in outcomes if in_flight.pop(one.number, None) is not None]
        if self._losses or len(self._suspects) or self._suspects.guilty:
            self._clear({one.number for one in wanted})
        return wanted

    def lost(self, key: int, *, by_engine: bool) -> None:
        """A replica is gone. `by_engine`: its engine died, perhaps of what it had in flight."""
        replica = self._replicas.pop(key)
        self._free_stretch(replica)
        in_flight = replica.in_flight
        if not by_engine:
            for number in in_flight:
                self._losses[number] = self._losses.get(number, 0) + 1
        often = [n for n in in_flight if self._losses.get(n, 0) >= MAX_LOSSES]
        if replica.is_trying:
            if by_engine or often:
                self._suspects.died(list(in_flight), beside=False)
            self._suspected |= in_flight
            return
        blamed = list(in_flight) if by_engine else often
        self._suspects.died(blamed, beside=True)
        self._suspected |= {number: in_flight[number] for number in blamed}
        again = deque(one for number, one in in_flight.items() if number not in self._suspected)
        if again:
            self._free.appendleft(again)
            self._num_waiting += len(again)

    def give_back(self, key: int) -> None:
        """A replica that has nothing in flight ends, as it should."""
        self._free_stretch(self._replicas.pop(key))

    @property
    def num_guilty(self) -> int:
        """How many of those that wait are."""
        return sum(number in self._suspected for number in self._suspects.guilty)

    def take_guilty(self) -> list[int]:
        """Requests an engine died with twice, alone in flight. Nobody runs them again."""
        guilty = [number for number in self._suspects.guilty if number in self._suspected]
        self._clear(frozenset(guilty))
        return guilty

    # -- inside --------------------------------------------------------------------------------

    def _stretches(self) -> Iterable[deque[EngineRequest]]:
        yield from self._free
        for replica in self._replicas.values():
            yield replica.stretch

    def _clear(self, gone: Collection[int]) -> None:
        """They are no suspects any more, and what happened to them is forgotten."""
        for number in gone:
            self._suspected.pop(number, None)
            self._losses.pop(number, None)
        self._suspects.forget(lambda number: number in gone)

    def _free_stretch(self, replica: _Replica) -> None:
        if replica.stretch:
            self._free.appendleft(replica.stretch)
        elif replica.stretch is self._tail:
            self._tail = None

    def _find_work(self, replica: _Replica) -> bool:
        """Give it, which has none left, a stretch: one that nobody works on, or half of another's.

        Returns whether there is one.
        """
        if replica.stretch is self._tail:
            self._tail = None
        while self._free:
            stretch = self._free.popleft()
            if stretch:
                replica.stretch = stretch
                return True
            if stretch is self._tail:
                self._tail = None
        longest = max((other.stretch for other in self._replicas.values()), key=len)
        if not longest:
            return False
        at = _cut(longest)
        further = deque(islice(longest, at, None))
        while len(longest) > at:
            longest.pop()
        if longest is self._tail:
            self._tail = further
        replica.stretch = further
        return True


def _cut(stretch: deque[EngineRequest]) -> int:
    """Where to cut, so that both sides get a fair part and share the least: near the middle, if
    they share as little everywhere. 0 for a stretch of one: all of it goes."""
    size = len(stretch)
    if size < 2:
        return 0
    least = max(1, size // _LEAST_SHARE)
    places = range(least, size - least + 1)
    shared = [request.shared for request in islice(stretch, least, size - least + 1)]
    return min(
        zip(shared, places, strict=True), key=lambda pair: (pair[0], abs(2 * pair[1] - size))
    )[1]
