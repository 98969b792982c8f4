"""The lines of a batch's log that say how far it is, every few seconds while it runs."""

from __future__ import annotations

import time

from batch_app.batch_log import BatchLog, pace_text, truncated_text
from batch_app.core import Progress


class ProgressLog:
    """For the thread that runs the batch."""

    def __init__(self, batch_log: BatchLog, total: int, every_s: float) -> None:
        """`total`: requests of the batch. `every_s`: seconds between two lines."""
        self._batch_log = batch_log
        self._total = total
        self._every_s = every_s
        self._next = 0.0
        # At the line before.
        self._at = 0.0
        self._tokens = self._written = 0

    def tell(
        self,
        progress: Progress,
        *,
        num_in_flight: int,
        tokens: int,
        written: int,
        prompt_tokens: int = 0,
    ) -> None:
        """`tokens`: of the requests computed so far; `written`: of answers, as the engine counts;
        `prompt_tokens`: of prompts, as it counts them.

        The first call writes nothing: it is what the first line's pace is counted from.
        """
        now = time.monotonic()
        if now < self._next:
            return
        if self._next:
            passed_s = now - self._at
            self._batch_log.write(
                f"{progress.done:,} of {self._total:,} done "
                f"({100 * progress.done / self._total:.1f}%), "
                f"{progress.failed:,} failed, "
                + (f"{truncated_text(progress.truncated)}, " if progress.truncated else "")
                + f"{num_in_flight:,} in flight, "
                + pace_text(
                    (tokens - self._tokens) / passed_s,
                    (written - self._written) / passed_s,
                    prompt_tokens if num_in_flight and not written else None,
                )
            )
        self._tokens, self._at, self._written = tokens, now, written
        self._next = now + self._every_s
