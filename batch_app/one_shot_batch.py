"""The batch of a one-shot run (`one_shot`): made, or found again, and run by a worker here."""

from __future__ import annotations

import filecmp
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch_app.batch_log import BatchLog, truncated_text
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile, utc_now
from batch_app.engine.process import EngineProcess
from batch_app.errors import BadLines, BadRequest, Conflict
from batch_app.failure_policy import decide_for_one_run
from batch_app.files import (
    DataDir,
    IncomingFolder,
    atomic_writer,
    move_durably,
    new_id,
    no_room_is_storage_full,
    remove_tree,
    sync_dir,
)
from batch_app.intake import index_file
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.registry_file import entry_text
from batch_app.store import Store
from batch_app.validation import intake_rules
from batch_app.worker import Worker

LOOK_EVERY_S = 0.1
GOING_ON_OTHERWISE = "Going on with other engine arguments than before; what is answered stays.\n"


class OneShotBatch:
    """The run's only batch. `settings` are the run's own: their data folder is there, and locked.

    `stop` may be set from any thread; what is committed stays.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        entry: ModelEntry,
        settings: Settings,
        overwrite: bool,
        stop: threading.Event,
    ) -> None:
        self._source = source
        self._output = output
        self._entry = entry
        self._overwrite = overwrite
        self._settings = settings
        self._data = DataDir(settings.data_dir)
        self._stop = stop

    def run(self, ready: EngineProcess) -> Batch:
        """Run what is left of it, on the engine that stands ready. Raises as `OneShot.run`."""
        store = Store(self._settings.resolved_database_url)
        try:
            store.migrate()
            batch = self._batch(store)
            if not batch.is_terminal:
                batch = self._work(store, batch, ready)
            return batch
        finally:
            store.close()

    def _batch(self, store: Store) -> Batch:
        """The batch of the run that this one goes on with, or a new one."""
        batches, _ = store.list_batches(limit=1)
        if batches and batches[0].status is not BatchStatus.FAILED:
            self._check_same(batches[0])
            self._write_registry()
            return batches[0]
        if batches and self._output.exists() and not self._overwrite:
            raise BadRequest(
                f"The run before this one failed, and {self._output} holds what it answered. "
                "Remove it, or give --overwrite, to begin anew."
            )
        self._write_registry()
        return self._add_batch(store)

    def _check_same(self, batch: Batch) -> None:
        kept = self._data.input_file(batch.input_file_id)
        before = ModelRegistry.load(self._settings.models).entries[0]
        same = (
            batch.model == self._entry.name
            and (before.source, before.revision) == (self._entry.source, self._entry.revision)
            and filecmp.cmp(kept, self._source, shallow=False)
        )
        if same and before != self._entry:
            # With smaller limits it may go on where it ran out of memory.
            sys.stderr.write(GOING_ON_OTHERWISE)
        if not same:
            raise Conflict(
                f"{self._data.root} holds an unfinished run of another input or model "
                f"({batch.model}). Finish that one, or remove the folder to begin anew."
            )

    def _write_registry(self) -> None:
        with atomic_writer(self._settings.models) as file:
            file.write(entry_text(self._entry.model_dump(exclude_none=True)).encode())

    def _add_batch(self, store: Store) -> Batch:
        now = utc_now()
        batch = Batch(
            id=new_id("batch"),
            dialect=Dialect.NATIVE,
            status=BatchStatus.QUEUED,
            endpoint="",
            model=self._entry.name,
            input_file_id=new_id("file"),
            created_at=now,
            queued_at=now,
            total=0,
        )
        rules = intake_rules(batch, self._settings, ModelRegistry([self._entry]))
        input_path = self._data.input_file(batch.input_file_id)
        try:
            with IncomingFolder(self._data) as folder:
                # A copy: the original may be edited in place while the batch runs.
                with no_room_is_storage_full("copying the input"):
                    shutil.copyfile(self._source, input_path)
                    _sync_file(input_path)
                    sync_dir(input_path.parent)
                summary = index_file(input_path, folder, rules)
                move_durably(folder, self._data.work_dir(batch.id))
        except BadLines:
            remove_tree(self._data.root)
            raise
        batch = replace(batch, endpoint=summary.endpoints[0], total=summary.num_requests)
        size_bytes = input_path.stat().st_size
        BatchLog(self._data.log_file(batch.id)).write(
            f"submitted: {batch.total} requests, {size_bytes} bytes, model {self._entry.name}"
        )
        return store.add_batch(
            batch,
            StoredFile(batch.input_file_id, FilePurpose.BATCH, self._source.name, size_bytes, now),
        )

    # -- running -------------------------------------------------------------------------------

    def _work(self, store: Store, batch: Batch, ready: EngineProcess) -> Batch:
        """Run a worker until the batch has ended, or until it is to stop."""
        worker_stop = threading.Event()
        worker = Worker(self._settings, stop=worker_stop, ready=ready, decide=decide_for_one_run)
        # Not a daemon: the engine process dies with the thread that started it.
        thread = threading.Thread(target=worker.run, name="worker")
        thread.start()
        try:
            with _progress(batch.total, self._settings.progress_log_s) as show:
                while thread.is_alive():
                    batch = store.get_batch(batch.id)
                    show(batch)
                    if batch.is_terminal or self._stop.is_set():
                        worker_stop.set()
                    thread.join(LOOK_EVERY_S)
        finally:
            worker_stop.set()
            thread.join()
        return store.get_batch(batch.id)


class _Show:
    """Tells a person how far the batch is, on standard error, where that has changed."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = 0.0
        self._said = ""

    def __call__(self, batch: Batch) -> None:
        now = time.monotonic()
        if now < self._next and not batch.is_terminal:
            return
        self._next = float("inf") if batch.is_terminal else now + self._every_s
        done, total = batch.progress.done, batch.total
        text = f"{done:,} of {total:,} done ({100 * done / total:.1f}%)"
        text += f", {batch.progress.failed:,} failed"
        if batch.progress.truncated:
            text += f", {truncated_text(batch.progress.truncated)}"
        if batch.paused:
            text += f"; paused: {batch.paused.reason}"
        elif not done and not batch.is_terminal:
            text = f"Loading {batch.model}, then the first answers …"
        if text != self._said:
            self._said = text
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class _ShowBar:
    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("loading the model", total=total)

    def __call__(self, batch: Batch) -> None:
        done, failed = batch.progress.done, batch.progress.failed
        what = "answering" if done else "loading the model"
        if batch.paused:
            what = f"paused: {batch.paused.reason}"
        self._bar.update(
            self._task,
            completed=done,
            description=f"{what}, {failed:,} failed" if failed else what,
        )


@contextmanager
def _progress(total: int, every_s: float) -> Iterator[_Show | _ShowBar]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Show(every_s)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        yield _ShowBar(bar, total)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
