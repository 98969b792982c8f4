"""The lease of a claimed batch, kept by a thread while its holder does what may take long: reading
a results log of millions, indexing a file again, publishing.

While a batch runs, its keeper (`batch_app.keeper`) does that beside its other work.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from batch_app.core import Batch
from batch_app.errors import LeaseLost, StorageFull, StoreUnavailable
from batch_app.store import Store

logger = logging.getLogger(__name__)


#: So often a lease is renewed within its time, unless its holder says otherwise.
RENEWALS = 5


class HeldLease:
    """Keeps it from enter to exit. Seconds."""

    def __init__(
        self, store: Store, batch: Batch, *, lease_s: float, every_s: float | None = None
    ) -> None:
        self._store = store
        self._batch = batch
        self._lease_s = lease_s
        self._every_s = lease_s / RENEWALS if every_s is None else every_s
        self._lost: LeaseLost | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> HeldLease:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises LeaseLost where somebody else has the batch by now: further work is in vain."""
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self._store.renew(self._batch, lease_s=self._lease_s)
            except LeaseLost as error:
                self._lost = error
                return
            except (StoreUnavailable, StorageFull) as error:
                logger.warning("The lease of %s is not renewed: %s", self._batch.id, error.message)
