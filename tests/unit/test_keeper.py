"""The keeper: what it tells the store, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Progress
from batch_app.engine.base import Outcome
from batch_app.keeper import Delivery, Keeper
from batch_app.results import ResultsLog
from support.batches import running_batch
from support.waiting import wait_for


class ToldStore:
    """A store as far as the keeper knows it."""

    def __init__(self) -> None:
        self.told: list[Progress] = []

    def renew(self, _batch: Batch, *, progress: Progress, **_: Any) -> BatchStatus:
        self.told.append(progress)
        return BatchStatus.RUNNING


@contextmanager
def keeping(folder: Path, **settings: float) -> Iterator[tuple[Keeper, ResultsLog, ToldStore]]:
    """A keeper at work that has told once, as it does at the start."""
    store, log = ToldStore(), ResultsLog(folder, 20, 1)
    keeper = Keeper(
        store=store,  # type: ignore[arg-type]
        batch=running_batch(20),
        log=log,
        batch_log=BatchLog(folder / "log"),
        settings=Settings(commit_interval_s=0.01, heartbeat_s=3600, lease_s=7200, **settings),
    )
    keeper.start()
    try:
        wait_for(lambda: store.told)
        yield keeper, log, store
    finally:
        keeper.stop()


def deliver(keeper: Keeper, number: int) -> None:
    keeper.deliver([Delivery(f"r{number}", Outcome(number, 200, b"{}"))])


def test_progress_is_told_as_results_are_committed(tmp_path: Path) -> None:
    with keeping(tmp_path) as (keeper, _, store):
        for number in range(3):
            deliver(keeper, number)
            wait_for(lambda number=number: store.told[-1].done == number + 1)


def test_progress_is_told_less_often_where_that_is_set(tmp_path: Path) -> None:
    with keeping(tmp_path, progress_interval_s=3600) as (keeper, log, store):
        for number in range(3):
            deliver(keeper, number)
            wait_for(lambda number=number: log.progress.done == number + 1)
        assert [progress.done for progress in store.told] == [0]
        assert keeper.flush().done == 3  # whoever ends the batch needs it told
        assert [progress.done for progress in store.told] == [0, 3]
        deliver(keeper, 3)
    assert [progress.done for progress in store.told] == [0, 3, 4]  # at the end, too
