"""The suspects: requests that were in flight when the engine died, one of which may be the cause.

They run after all others, and only among themselves: first those of one death together, then, when
the engine dies again, one half after the other. A request is guilty when the engine died twice with
it alone in flight; a single death, whoever caused it, makes nobody guilty. Whoever finishes is no
suspect any more. To find one among n takes about log2(n) + 3 deaths.

Pure, but for `load` and `save`: a worker that is killed in the middle of a search leaves what is
known so far to the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import orjson

from batch_app.files import atomic_writer

#: Deaths of the engine with only this request in flight that make it guilty.
DEATHS_ALONE = 2
#: The code of its error line.
QUARANTINED = "request_quarantined"


class Suspects:
    """Groups of requests to try, each alone on the engine, and who is guilty.

    The groups are disjoint, and none is empty.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[int, ...]] = []
        self._deaths_alone: dict[int, int] = {}

    def __len__(self) -> int:
        """How many are suspects still, not counting the guilty."""
        return sum(len(group) for group in self._groups)

    @property
    def numbers(self) -> list[int]:
        """Of all suspects."""
        return [number for group in self._groups for number in group]

    @property
    def guilty(self) -> list[int]:
        """Those the engine died with twice, alone in flight."""
        return sorted(n for n, deaths in self._deaths_alone.items() if deaths >= DEATHS_ALONE)

    @property
    def longest_search(self) -> int:
        """How often the engine may die, at most, before one of the suspects is found guilty."""
        largest = max((len(group) for group in self._groups), default=0)
        return largest.bit_length() + DEATHS_ALONE if largest else 0

    def next_group(self, among: Collection[int]) -> list[int]:
        """Who is to run next, of these, and nobody beside them. Empty: none of these is one."""
        for group in self._groups:
            chosen = [number for number in group if number in among]
            if chosen:
                return chosen
        return []

    def died(self, in_flight: Collection[int], *, beside: bool) -> None:
        """The engine died with these in flight.

        `beside`: others than one group of suspects were allowed to run; then these are a group
        to try. Otherwise they are all that is left of `next_group`, and fall in halves.
        """
        numbers = tuple(in_flight)
        if not numbers:
            return
        known = set(numbers)
        if beside:
            self._groups = _without(self._groups, known)
            self._groups.append(numbers)
        else:
            place = next(p for p, group in enumerate(self._groups) if known & set(group))
            rest = tuple(number for number in self._groups[place] if number not in known)
            half = len(numbers) // 2
            parts = (numbers[:half], numbers[half:], rest)
            self._groups[place : place + 1] = [part for part in parts if part]
        if len(numbers) == 1:
            number = numbers[0]
            self._deaths_alone[number] = self._deaths_alone.get(number, 0) + 1
            if self._deaths_alone[number] >= DEATHS_ALONE:
                self._groups = _without(self._groups, known)

    def forget(self, is_done: Callable[[int], bool]) -> None:
        """Take out all who have a result."""
        everyone = {number for group in self._groups for number in group} | set(self._deaths_alone)
        done = {number for number in everyone if is_done(number)}
        self._groups = _without(self._groups, done)
        for number in done & self._deaths_alone.keys():
            del self._deaths_alone[number]

    @classmethod
    def load(cls, path: Path) -> Suspects:
        """What `save` wrote; nobody, where there is no such file or it can't be understood."""
        suspects = cls()
        try:
            saved = orjson.loads(path.read_bytes())
            suspects._groups = [tuple(map(int, group)) for group in saved["groups"] if group]
            suspects._deaths_alone = {int(n): int(d) for n, d in saved["deaths_alone"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        return suspects

    def save(self, path: Path) -> None:
        """Whole and durable, or not at all. Raises StorageFull, OSError."""
        if not self._groups and not self._deaths_alone:
            path.unlink(missing_ok=True)
            return
        deaths = {str(number): count for number, count in self._deaths_alone.items()}
        with atomic_writer(path) as file:
            file.write(orjson.dumps({"groups": self._groups, "deaths_alone": deaths}))


def _without(groups: list[tuple[int, ...]], gone: Collection[int]) -> list[tuple[int, ...]]:
    kept = (tuple(number for number in group if number not in gone) for group in groups)
    return [group for group in kept if group]
