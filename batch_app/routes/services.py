"""What the handlers share: the open store, the folders, the registry, the benchmarks, the clock."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from threading import Event

from anyio import CapacityLimiter
from starlette.requests import Request

from batch_app.access import Access
from batch_app.appraisal import Appraisal
from batch_app.audit import AuditLog
from batch_app.background import BackgroundThread
from batch_app.benchmarks import BenchmarkFolder
from batch_app.checkers import CheckerPlaces
from batch_app.clock import DueClock
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Paused, PauseKind, utc_now
from batch_app.dry_run import DryRuns
from batch_app.errors import NotFound
from batch_app.estimates import Estimate
from batch_app.estimating import Estimating, Turn
from batch_app.files import DataDir, new_id
from batch_app.housekeeping import Housekeeping
from batch_app.idempotency import KeysInUse
from batch_app.incoming import MAX_BUSY_UPLOADS, UploadServices
from batch_app.keys import Caller
from batch_app.objects import open_objects
from batch_app.outbox import Outbox, tls_context
from batch_app.outlook import Outlook
from batch_app.registry import ModelRegistry
from batch_app.registry_watch import WatchedRegistry
from batch_app.retention import Retention
from batch_app.store import LEASED, Store
from batch_app.validation import Validation

#: Another server may have left something to do; one's own wakes at once.
VALIDATION_EVERY_S = 2.0
HOUSEKEEPING_EVERY_S = 1.0
SENDING_EVERY_S = 1.0
COUNTING_EVERY_S = 2.0
NOTE_KEY_USES_EVERY_S = 60.0
_BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")


@dataclass(frozen=True)
class Services:
    """One per app. `stopping` is set when the server has been asked to end."""

    settings: Settings
    data: DataDir
    store: Store
    watched_registry: WatchedRegistry
    benchmarks: BenchmarkFolder
    clock: Callable[[], datetime] = field(default_factory=DueClock)
    stopping: Event = field(default_factory=Event)
    keys_in_use: KeysInUse = field(default_factory=KeysInUse)
    upload_limiter: CapacityLimiter = field(
        default_factory=lambda: CapacityLimiter(MAX_BUSY_UPLOADS)
    )
    started_at: datetime = field(default_factory=utc_now)
    _uploads_under_way: Counter[str | None] = field(default_factory=Counter)
    _holder: str = field(default_factory=lambda: new_id("server"))

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Make the folders and the tables, sweep what interrupted uploads left, load the rest.

        Raises ConfigError, StoreUnavailable, StorageFull or OSError.
        """
        registry = WatchedRegistry(settings.models)
        tls_context(settings)  # a file of certificates that can't be read is said at the start
        data = DataDir(settings.data_dir, open_objects(settings))
        data.create()
        data.sweep_incoming()
        store = Store(settings.resolved_database_url)
        store.migrate()
        benchmarks = BenchmarkFolder(settings.benchmarks_dir)
        benchmarks.all()
        return cls(settings, data, store, registry, benchmarks)

    @property
    def registry(self) -> ModelRegistry:
        """As the file says now, or said when it could be read last."""
        return self.watched_registry.current

    def _current_registry(self) -> ModelRegistry:
        return self.registry

    def require_storage(self) -> None:
        """Raises StoreLost or StorageLost where what is accepted now would be lost."""
        self.store.require_same()
        self.data.require_present()

    def for_uploads(self, caller: Caller) -> UploadServices:
        return UploadServices(
            self.settings,
            self.data,
            self.store,
            self.registry,
            self.upload_limiter,
            self.clock,
            caller,
            self._uploads_under_way,
            self.appraisal.quick,
            self.counting.wake,
            self.checker_places,
        )

    @cached_property
    def checker_places(self) -> CheckerPlaces:
        return CheckerPlaces(self.settings.check_processes or os.cpu_count() or 1)

    @cached_property
    def retention(self) -> Retention:
        return Retention.of(self.settings)

    @cached_property
    def access(self) -> Access:
        """Who may come in."""
        return Access(self.settings, self.data, self.store, self.clock)

    @cached_property
    def audit(self) -> AuditLog:
        return AuditLog(self.data.audit_file, self.settings.audit_max_bytes, clock=self.clock)

    @cached_property
    def key_uses(self) -> BackgroundThread:
        """Notes when keys were last used. Started and stopped with the app."""
        return BackgroundThread("keys", self.access.note_uses, NOTE_KEY_USES_EVERY_S)

    @cached_property
    def validation(self) -> BackgroundThread:
        """Checks the lines of new batches. Started and stopped with the app."""
        work = Validation(
            self.settings,
            self.data,
            self.store,
            self._current_registry,
            self._holder,
            self.clock,
            self.stopping.is_set,
            self.appraisal.quick,
            self.counting.wake,
            self.checker_places,
        )
        return BackgroundThread("validation", work.run_once, VALIDATION_EVERY_S)

    @cached_property
    def outbox(self) -> Outbox:
        return Outbox(self.settings, self.store, self._holder, clock=self.clock)

    @cached_property
    def sending(self) -> BackgroundThread:
        """Sends what webhooks are to be told. Started and stopped with the app."""
        thread = BackgroundThread("webhooks", self.outbox.run_once, SENDING_EVERY_S)
        self.outbox.on_end = thread.wake
        return thread

    @cached_property
    def housekeeping(self) -> BackgroundThread:
        """Does what is due. Started and stopped with the app."""
        work = Housekeeping(
            self.settings, self.data, self.store, self._current_registry, self._holder, self.clock
        )
        return BackgroundThread("housekeeping", work.run_once, HOUSEKEEPING_EVERY_S)

    # -- estimates -----------------------------------------------------------------------------

    @cached_property
    def outlook(self) -> Outlook:
        return Outlook(self._current_registry, self.benchmarks)

    @cached_property
    def estimating(self) -> Estimating:
        return Estimating(self.settings, self.store, self.outlook, self.clock)

    @cached_property
    def appraisal(self) -> Appraisal:
        return Appraisal(
            self.settings, self.data, self.store, self._current_registry, self.outlook, self.clock
        )

    @cached_property
    def counting(self) -> BackgroundThread:
        """Counts the prompts of new batches. Started and stopped with the app."""
        return BackgroundThread("counting", self.appraisal.run_once, COUNTING_EVERY_S)

    @cached_property
    def dry_runs(self) -> DryRuns:
        def turn(model: str) -> Turn:
            return self.estimating.wait_for_new(model, now=self.clock())

        return DryRuns(
            self.settings,
            self._current_registry,
            self.outlook,
            turn,
            self.clock,
            self.checker_places,
        )

    def estimate(self, batch: Batch) -> Estimate | None:
        """What a batch has still before it; None for a finished one, or with nothing to go by.

        Looks at the store once more; blocks.
        """
        return self.estimating.of(batch)

    def estimates(self, page: Iterable[Batch]) -> list[Estimate | None]:
        """The same for a page of the list, with one look at the queue for all."""
        return self.estimating.of_page(page)

    def with_pause(self, batch: Batch) -> Batch:
        """The batch, with what this server sees for itself when the worker can't tell any more:
        a disk that takes no results takes no reason either."""
        if batch.paused or batch.status not in (BatchStatus.QUEUED, *LEASED):
            return batch
        trouble = self.data.trouble()
        if trouble is None:
            return batch
        return replace(batch, paused=Paused(PauseKind.DISK, trouble, since=self.clock()))


def services(request: Request) -> Services:
    """The app's services, for a handler."""
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


def caller(request: Request) -> Caller:
    """Who asks, as `Authentication` has found out."""
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


def note_object(request: Request, object_id: str) -> None:
    """Tell the audit log what this request made."""
    request.state.made = object_id


def checked_batch_id(batch_id: str) -> str:
    """The id, if it looks like one the server made: nothing else ever reaches a path or a query."""
    if not _BATCH_ID.fullmatch(batch_id):
        raise NotFound(f"No such batch: {batch_id[:64]!r}", param="batch_id")
    return batch_id
