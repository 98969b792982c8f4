"""One file, answered in one process, without a server: `vllm-batch run INPUT OUTPUT --model NAME`.

It is a batch like any other, in a data folder of its own beside the output (`OUTPUT.work`), run by
a worker in this process. So it may be killed at any moment, and the same command goes on from
there. The folder is removed when the output is complete.

The engine process is started as soon as it is clear that there is something to run: while it
imports its libraries, ours are imported here (`one_shot_batch`), and the file is looked through.

The output is what vLLM's `run-batch` writes, so that its readers read it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from batch_app import logs
from batch_app.batch_log import failed_and_truncated
from batch_app.config import Settings
from batch_app.core import Batch, BatchStatus
from batch_app.engine.process import EngineProcess
from batch_app.engine.slot import model_spec, network_for
from batch_app.errors import BadRequest, Conflict
from batch_app.files import DataDir, atomic_writer, move_durably, remove_tree
from batch_app.registry import ModelEntry
from batch_app.stop_signals import StopSignals

EXIT_STOPPED = 130


def work_folder(output: Path) -> Path:
    """Where the run that writes this output keeps what it needs to go on after a crash."""
    return output.with_name(f"{output.name}.work")


def own_data(settings: Settings, output: Path) -> Settings:
    """The same settings, on the run's own data folder, database and registry."""
    folder = work_folder(output)
    changes: dict[str, object] = {
        "data_dir": folder,
        "storage_url": "",
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
            with self._ready_engine() as ready:
                batch = self._answer(ready)
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

    @contextmanager
    def _ready_engine(self) -> Iterator[EngineProcess]:
        """An engine process that gets ready by itself; ended with the block, whoever has it."""
        spec = model_spec(self._entry)
        network = network_for(spec, self._settings)
        process = EngineProcess(self._data.engine_log, network, spec.engine)
        try:
            yield process
        finally:
            process.close()

    def _answer(self, ready: EngineProcess) -> Batch:
        from batch_app.one_shot_batch import OneShotBatch  # takes a second or two

        return OneShotBatch(
            self._source,
            self._output,
            entry=self._entry,
            settings=self._settings,
            overwrite=self._overwrite,
            stop=self._stop,
        ).run(ready)

    def _take_output(self, batch: Batch) -> None:
        """Move the published lines to where they are wanted."""
        results = self._data.results_file(batch)
        if batch.status is BatchStatus.FAILED and not batch.progress.completed:
            return  # nothing but errors, all the same: the message says it once
        if not results.exists():
            return  # a run that was cut off just after this has moved them
        if batch.progress.failed:
            from batch_app.wire.lines import as_run_batch

            with results.open("rb") as lines, atomic_writer(self._output) as output:
                output.writelines(map(as_run_batch, lines))
            results.unlink()
        else:
            move_durably(results, self._output)


def main(
    source: Path,
    output: Path,
    *,
    entry: ModelEntry,
    settings: Settings,
    overwrite: bool = False,
    on_end: Callable[[Batch], None] = lambda batch: None,
) -> int:
    """The command: runs, tells the outcome on standard error, and returns the exit code. `on_end`
    gets the batch as the run left it.

    0: every request has a line in the output, those that failed among them. 1: the run failed.
    130: it was stopped.

    Raises BatchAppError as `OneShot.run`.
    """
    logs.say_on_stderr()
    stop = threading.Event()

    def on_signal() -> None:
        stop.set()  # before it is said: who then signals once more is understood
        _tell("Stopping: finishing what is in flight. Once more to stop at once.")

    # At the second, the engine process ends itself: its channel closes.
    with StopSignals(on_signal, exit_code=EXIT_STOPPED):
        one_shot = OneShot(
            source, output, entry=entry, settings=settings, overwrite=overwrite, stop=stop
        )
        batch = one_shot.run()
    on_end(batch)
    progress = batch.progress
    if batch.status is BatchStatus.COMPLETED:
        more = failed_and_truncated(progress.failed, progress.truncated)
        _tell(f"{progress.completed:,} of {batch.total:,} answered{more}: {output}")
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
