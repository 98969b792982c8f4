"""Validation: the background check of batches that were created from a file already uploaded.

One thread in each API server. A batch in `validating` is claimed by lease like any other, so that
several servers share the work and a crash only delays it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from batch_app import tracing
from batch_app.batch_log import BatchLog
from batch_app.checkers import CheckerPlaces
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect, LineError, utc_now
from batch_app.errors import (
    BadLines,
    BadRequest,
    Conflict,
    LeaseLost,
    StorageFull,
    StoreUnavailable,
)
from batch_app.failure_policy import Fail, decide, to_paused
from batch_app.faults import crash_point
from batch_app.files import DataDir, IncomingFolder, move_durably, remove_tree, wake_workers
from batch_app.intake import IntakeRules, IntakeSummary, index_file
from batch_app.lease import HeldLease
from batch_app.registry import ModelRegistry
from batch_app.shapes import BodyLimits
from batch_app.shared_files import fetch_input, remove_work, share_index, share_log
from batch_app.store import Store

#: What a dead server was checking is taken up after this.
LEASE_S = 60.0
RENEW_EVERY_S = 2.0
LONGEST_WINDOW_S = 366 * 86400


def intake_rules(batch: Batch, settings: Settings, registry: ModelRegistry) -> IntakeRules:
    """What the lines of this batch's file are held to."""
    native = batch.dialect is Dialect.NATIVE
    return IntakeRules(
        registry=registry,
        model=batch.model if native else None,
        endpoint=None if native else batch.endpoint,
        max_line_bytes=settings.max_line_bytes,
        max_requests=settings.max_requests_per_batch,
        max_errors=settings.max_line_errors,
        limits=BodyLimits.of(settings),
    )


class _Stopping(Exception):
    """The server ends: whoever starts next checks the batch anew."""


@dataclass(frozen=True)
class Validation:
    """Checks batches in `validating`, oldest first."""

    settings: Settings
    data: DataDir
    store: Store
    registry: Callable[[], ModelRegistry]
    holder: str
    clock: Callable[[], datetime] = utc_now
    stopping: Callable[[], bool] = lambda: False
    appraise: Callable[[Batch], Sequence[object] | None] = lambda _: None
    queued: Callable[[], None] = lambda: None
    checker_places: CheckerPlaces | None = None

    def run_once(self) -> bool:
        """Check one batch, if one waits for it. Returns whether one did.

        Raises whatever made the check impossible: the batch is paused, and checked again later.
        """
        batch = self.store.claim_to_validate(self.holder, LEASE_S, self.clock())
        if batch is None:
            return False
        try:
            self._validate(batch)
        except (LeaseLost, Conflict):
            self._clean_up(batch)  # cancelled meanwhile, or somebody else checks it by now
        except _Stopping:
            self.store.release(batch)
            return False
        except Exception as error:
            with suppress(LeaseLost, Conflict, StoreUnavailable, StorageFull):
                self._fail_or_pause(batch, error)
            raise
        return True

    def _fail_or_pause(self, batch: Batch, error: Exception) -> None:
        decision = decide(error, batch)
        if not isinstance(decision, Fail) and batch.expires_at and self.clock() >= batch.expires_at:
            decision = Fail(
                f"The completion window ({batch.completion_window}) ended before its lines could "
                f"be checked: {decision.reason}"
            )
        if isinstance(decision, Fail):
            self._refuse(batch, (), decision.message)
            return
        paused, num_pauses = to_paused(
            decision,
            batch,
            self.clock(),
            first_s=self.settings.pause_first_s,
            longest_s=self.settings.pause_longest_s,
        )
        self.store.pause(batch, paused, num_pauses)

    def _validate(self, batch: Batch) -> None:
        log = BatchLog(self.data.log_file(batch.id), clock=self.clock)
        keep = self._keeper_of(batch)
        try:
            input_path = fetch_input(self.data, batch.input_file_id, keep)
        except FileNotFoundError:
            input_path = None
        if input_path is None or not input_path.exists():
            raise FileNotFoundError(
                "The bytes of its input file are not where they belong. If the data folder's disk "
                "is away, or the file was removed by hand, put it back; else cancel the batch and "
                "upload the file again."
            )
        try:
            summary = self._check(batch, keep)
        except BadLines as refusal:
            self._refuse(batch, refusal.errors, refusal.message)
            log.write(f"refused: {refusal.num_errors} errors, the first: {refusal.errors[0].code}")
            share_log(self.data, batch.id)
            return
        self.store.transition(
            batch,
            BatchStatus.QUEUED,
            self.clock(),
            total=summary.num_requests,
            model=summary.models[0],
            workload=self.appraise(batch),
            lease_owner=None,
        )
        crash_point("check-told")
        log.write(
            f"checked: {summary.num_requests} requests, "
            f"model{'s' if len(summary.models) > 1 else ''} {', '.join(summary.models)}"
        )
        share_log(self.data, batch.id)
        wake_workers(self.data)
        self.queued()

    def _check(self, batch: Batch, keep: Callable[[], None]) -> IntakeSummary:
        """Index the file beside its place, so that a crash leaves no half of an index."""
        with IncomingFolder(self.data) as folder, tracing.span("intake", batch.id):
            summary = index_file(
                self.data.input_file(batch.input_file_id),
                folder,
                intake_rules(batch, self.settings, self.registry()),
                on_read=keep,
                places=self.checker_places,
            )
            work_dir = self.data.work_dir(batch.id)
            remove_tree(work_dir)
            move_durably(folder, work_dir)
        with HeldLease(self.store, batch, lease_s=LEASE_S):
            share_index(self.data, batch.id)
        crash_point("check-moved")
        return summary

    def _keeper_of(self, batch: Batch) -> Callable[[], None]:
        """What keeps the lease while a long file is read, and ends the check when it is in vain."""
        next_beat = time.monotonic() + RENEW_EVERY_S

        def keep() -> None:
            nonlocal next_beat
            if self.stopping():
                raise _Stopping
            if time.monotonic() < next_beat:
                return
            next_beat = time.monotonic() + RENEW_EVERY_S
            status = self.store.renew(batch, lease_s=LEASE_S)
            if status is not BatchStatus.VALIDATING:
                raise LeaseLost(f"Batch {batch.id} is {status.value} already.")

        return keep

    def _refuse(self, batch: Batch, errors: Sequence[LineError], message: str = "") -> None:
        self.store.transition(
            batch,
            BatchStatus.FAILED,
            self.clock(),
            errors=errors,
            error_message=message or errors[0].message,
        )

    def _clean_up(self, batch: Batch) -> None:
        """Remove the index of a batch that ended during its check. While it is `cancelling`, that
        is left to whoever ends it."""
        if self.store.get_batch(batch.id).is_terminal:
            remove_work(self.data, batch.id)


def window_end(created_at: datetime, completion_window: str) -> datetime:
    """When a completion window (`24h`, `90m`, `7d`) that begins now ends. Raises BadRequest."""
    unit = {"m": 60, "h": 3600, "d": 86400}.get(completion_window[-1:])
    number = completion_window[:-1]
    usable = unit is not None and number.isascii() and number.isdecimal() and len(number) <= 6
    if unit is None or not usable or not 1 <= int(number) * unit <= LONGEST_WINDOW_S:
        raise BadRequest(
            'The completion_window must be a number of minutes, hours or days, up to a year: "24h",'
            ' "90m", "7d".',
            param="completion_window",
        )
    return created_at + timedelta(seconds=int(number) * unit)
