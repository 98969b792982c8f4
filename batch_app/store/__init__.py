"""The store: what is known of files, batches and workers. The only place with SQL.

Every method is one transaction. A state changes only along `core.TRANSITIONS`; whoever works on a
batch proves by its epoch that the batch is still its own, and an older epoch changes nothing
(`LeaseLost`). Rows come out as the frozen types of `core`.

All methods raise `StoreUnavailable` (retriable) when the database does not answer, and
`StorageFull` when its disk is full.
"""

from batch_app.store.batches import LEASED, BatchStore
from batch_app.store.files import FileStore, require_pending
from batch_app.store.keys import KeyStore
from batch_app.store.leases import LeaseStore
from batch_app.store.pauses import PauseCount, PauseStore
from batch_app.store.remains import RemainsStore
from batch_app.store.samples import SampleStore
from batch_app.store.sessions import SessionStore
from batch_app.store.totals import ModelLoads, Totals, TotalsStore
from batch_app.store.webhooks import WebhookStore
from batch_app.store.workers import MISSED_HEARTBEATS, WorkerRow, WorkerStore

__all__ = [
    "LEASED",
    "MISSED_HEARTBEATS",
    "ModelLoads",
    "PauseCount",
    "Store",
    "Totals",
    "WorkerRow",
    "require_pending",
]


class Store(
    FileStore,
    BatchStore,
    LeaseStore,
    PauseStore,
    SampleStore,
    WorkerStore,
    KeyStore,
    SessionStore,
    RemainsStore,
    TotalsStore,
    WebhookStore,
):
    """One per process; safe to use from several threads."""
