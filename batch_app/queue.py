"""Whose turn it is. Pure: the store says what waits, this says what runs next.

First in, first out, with three exceptions. A batch that lost its worker goes on first. A higher
`priority` goes first. And among batches of equal priority, those for the model that is loaded may
go before an older one for another model, since a load costs minutes: but nobody is passed over for
longer than a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from batch_app.core import Choice, Waiting


def choose(
    waiting: Sequence[Waiting],
    *,
    loaded_model: str | None,
    now: datetime,
    bound_s: float,
    run_s: Callable[[Waiting], float | None] = lambda _: None,
) -> Choice | None:
    """Which batch a worker should claim; None where none waits.

    Args:
        loaded_model: the model that this worker has loaded, if any.
        bound_s: longest time that a batch may be passed over; 0 makes it plain first in, first out.
        run_s: how long a batch is expected to run, in seconds, None where that isn't known. A
            batch goes before an older one only if it is expected to be done within the older
            one's bound; one of unknown length may begin as long as the bound hasn't passed.
    """
    if not waiting:
        return None
    begun = [batch for batch in waiting if batch.begun]
    if begun:
        return Choice(min(begun, key=lambda batch: batch.place).batch_id)
    highest = max(batch.priority for batch in waiting)
    line = sorted((b for b in waiting if b.priority == highest), key=lambda batch: batch.place)
    oldest = line[0]
    if loaded_model is None or oldest.model == loaded_model:
        return Choice(oldest.batch_id)
    for position, batch in enumerate(line):
        if batch.model != loaded_model:
            continue
        passed_over = line[:position]
        expected_s = run_s(batch) or 0.0
        if all(_waited_s(other, now) + expected_s < bound_s for other in passed_over):
            return Choice(batch.batch_id, tuple(other.batch_id for other in passed_over))
        break  # a younger one would pass over these, too
    return Choice(oldest.batch_id)


def _waited_s(batch: Waiting, now: datetime) -> float:
    if batch.passed_over_at is None:
        return 0.0
    return max(0.0, (now - batch.passed_over_at).total_seconds())
