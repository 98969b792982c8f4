"""One file, answered in one process, without a server: `vllm-batch run INPUT OUTPUT --model NAME`.

It is a batch like any other, in a data folder of its own beside the output (`OUTPUT.work`), run by
a worker in this process. So it may be killed at any moment, and the same command goes on from
there. The folder is removed when the output is complete.

The output is what vLLM's `run-batch` writes, so that its readers read it.
"""

from __future__ import annotations

import fcntl
import filecmp
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, StoredFile, utc_now
from batch_app.errors import BadLines, BadRequest, Conflict
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
from batch_app.wire.lines import as_run_batch
from batch_app.worker import EXIT_AT_ONCE, Worker

LOOK_EVERY_S = 0.25
EXIT_STOPPED = 130


def work_folder(output: Path) -> Path:
    """Where the run that writes this output keeps what it needs to go on after a crash."""
    return output.with_name(f"{output.name}.work")


def own_data(settings: Settings, output: Path) -> Settings:
    """The same settings, on the run's own data folder, database and registry."""
    folder = work_folder(output)
    changes: dict[str, object] = {
        "data_dir": folder,
        "database_url": f"sqlite:///{folder / 'database' / 'batch_jobs.db'}",
        "models": folder / "models.toml",
    }
    if "benchmarks_dir" not in settings.model_fields_set and not settings.benchmarks_dir.exists():
        # Not in a project's folder: what was measured would lie about in somebody's own.
        changes["benchmarks_dir"] = folder / "benchmarks"
    return settings.model_copy(update=changes)


class OneShot:
    """One run. `stop` may be set from any thread; what is committed stays."""

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        entry: ModelEntry,
        settings: Settings,
        overwrite: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        """`entry`: the model that answers, with its engine's arguments."""
        self._source = source
        self._output = output.absolute()
        self._entry = entry
        self._overwrite = overwrite
        self._folder = work_folder(self._output)
        self._settings = own_data(settings, self._output)
        self._data = DataDir(self._folder)
        self._stop = stop or threading.Event()

    def run(self) -> Batch:
        """Answer the file, or the rest of it. Returns the batch as it is now.

        With status `completed` the output is whole. With `failed` it is there if anything was
        answered, with an error on each line that wasn't. With any other status the run was
        stopped, and goes on with the next call.

        Raises:
            BadLines: the file can't run; nothing was done.
            BadRequest: there is no such input, or the output is there already.
            Conflict: another process is at it, or an earlier run was of another input or model.
            StorageFull, StoreUnavailable, OSError: of the disk; what is committed stays.
        """
        if not self._source.is_file():
            raise BadRequest(f"There is no input file {self._source}.")
        if not self._output.parent.is_dir():
            raise BadRequest(f"There is no folder {self._output.parent} for the output.")
        if not self._folder.exists() and self._output.exists() and not self._overwrite:
            raise BadRequest(
                f"{self._output} is there already. Remove it, or give --overwrite to replace it."
            )
        with self._locked_folder():
            self._data.create()
            store = Store(self._settings.resolved_database_url)
            try:
                store.migrate()
                batch = self._batch(store)
                if not batch.is_terminal:
                    batch = self._work(store, batch)
            finally:
                store.close()
            if batch.is_terminal:
                self._take_output(batch)
            if batch.status is BatchStatus.COMPLETED:
                remove_tree(self._folder)
        return batch

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        self._folder.mkdir(exist_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Conflict(f"Another process is at work in {self._folder}.") from None
        try:
            yield
        finally:
            os.close(descriptor)

    # -- the batch -----------------------------------------------------------------------------

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
            _tell("Going on with other engine arguments than before; what is answered stays.")
        if not same:
            raise Conflict(
                f"{self._folder} holds an unfinished run of another input or model "
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
            remove_tree(self._folder)
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

    def _work(self, store: Store, batch: Batch) -> Batch:
        """Run a worker until the batch has ended, or until it is to stop."""
        worker_stop = threading.Event()
        worker = Worker(self._settings, stop=worker_stop)
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

    def _take_output(self, batch: Batch) -> None:
        """Move the published lines to where they are wanted."""
        results = self._data.results_file(batch)
        if batch.status is BatchStatus.FAILED and not batch.progress.completed:
            return  # nothing but errors, all the same: the message says it once
        if not results.exists():
            return  # a run that was cut off just after this has moved them
        if batch.progress.failed:
            with results.open("rb") as lines, atomic_writer(self._output) as output:
                output.writelines(map(as_run_batch, lines))
            results.unlink()
        else:
            move_durably(results, self._output)


class _Show:
    """Tells a person how far the batch is, on standard error."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = 0.0

    def __call__(self, batch: Batch) -> None:
        now = time.monotonic()
        if now < self._next and not batch.is_terminal:
            return
        if self._next or batch.is_terminal:
            done, total = batch.progress.done, batch.total
            share = 100 * done / total
            sys.stderr.write(
                f"{done:,} of {total:,} done ({share:.1f}%), {batch.progress.failed:,} failed\n"
            )
            sys.stderr.flush()
        self._next = float("inf") if batch.is_terminal else now + self._every_s


class _ShowBar:
    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("loading the model", total=total)

    def __call__(self, batch: Batch) -> None:
        done, failed = batch.progress.done, batch.progress.failed
        what = "answering" if done else "loading the model"
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


def main(
    source: Path, output: Path, *, entry: ModelEntry, settings: Settings, overwrite: bool = False
) -> int:
    """The command: runs, tells the outcome on standard error, and returns the exit code.

    0: every request has a line in the output, those that failed among them. 1: the run failed.
    130: it was stopped.

    Raises BatchAppError as `OneShot.run`.
    """
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(EXIT_AT_ONCE)  # the engine process ends itself when its channel closes
        stop.set()  # before it is said: who then signals once more is understood
        _tell("Stopping: finishing what is in flight. Once more to stop at once.")

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, on_signal)
    one_shot = OneShot(
        source, output, entry=entry, settings=settings, overwrite=overwrite, stop=stop
    )
    try:
        batch = one_shot.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    progress = batch.progress
    if batch.status is BatchStatus.COMPLETED:
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        _tell(f"{progress.completed:,} of {batch.total:,} answered{failed}: {output}")
        return 0
    if batch.is_terminal:
        _tell(f"The run failed: {batch.error_message}")
        _tell(f"What led to it is in {work_folder(output) / 'logs'}.")
        return 1
    _tell(
        f"Stopped with {progress.done:,} of {batch.total:,} done. "
        "The same command goes on from here."
    )
    return EXIT_STOPPED if stop.is_set() else 1


def _tell(message: str) -> None:
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
