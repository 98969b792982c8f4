"""Finalize: the published files of a batch, in input order, each whole or not there at all.

Three files: all lines (the native dialect's results), the lines that succeeded (output) and those
that didn't (errors). Without failures the first two are one file under two names. Their names are
derived from batch and epoch: doing it again after a crash replaces each by its equal.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from batch_app.core import Batch, FilePurpose, StoredFile, is_success
from batch_app.files import DataDir, atomic_writer, derived_file_id, sync_dir
from batch_app.index import Index
from batch_app.inputs import InputFile
from batch_app.json_lines import escape_line_separators
from batch_app.results import ResultsLog
from batch_app.shared_files import fetch_input, share_output, share_results
from batch_app.wire.lines import error_line

WRITE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What to say of the requests that have no result: their `error.code` and `error.message`."""

    code: str
    message: str


CANCELLED = Unfinished("batch_cancelled", "The batch was cancelled before this request ran.")
EXPIRED = Unfinished(
    "batch_expired", "The batch's completion window ended before this request ran."
)


@dataclass(frozen=True, slots=True)
class Published:
    """The files that came of it; None where there was no line for one."""

    output: StoredFile | None
    errors: StoredFile | None

    @property
    def files(self) -> list[StoredFile]:
        return [file for file in (self.output, self.errors) if file is not None]


def publish(
    data: DataDir,
    batch: Batch,
    index: Index,
    log: ResultsLog,
    unfinished: Unfinished | None,
    now: datetime,
) -> Published:
    """Write the published files of a batch.

    `unfinished` says what stands for requests without a result; None asserts there are none.

    Raises:
        StorageFull: nothing half-written remains, the results log is as it was.
        ObjectsUnavailable: the same; the files are to be published again.
        ValueError: a request has no result and `unfinished` is None.
    """
    output_id, errors_id = derived_file_id(batch, "output"), derived_file_id(batch, "errors")
    output_path, errors_path = data.output_file(output_id), data.output_file(errors_id)
    results_path = data.results_file(batch)
    num_good = log.progress.completed
    if num_good == len(index):
        with atomic_writer(output_path) as output:
            for number in range(len(index)):
                output.write(_line(log, number))
        _same_file(output_path, results_path)
        share_output(data, output_id)
        return Published(_record(output_id, output_path, "output", batch, now), None)

    with contextlib.ExitStack() as stack:
        results = stack.enter_context(atomic_writer(results_path))
        errors = stack.enter_context(atomic_writer(errors_path))
        good: BinaryIO | None = None
        if num_good:
            good = stack.enter_context(atomic_writer(output_path))
        inputs = stack.enter_context(InputFile(fetch_input(data, batch.input_file_id), index))
        for number in range(len(index)):
            status = log.status_code(number)
            if status:
                line = _line(log, number)
            elif unfinished is None:
                raise ValueError(f"Request {number} of {batch.id} has no result.")
            else:
                custom_id = inputs.request(number).custom_id
                line = (
                    error_line(batch.id, number, custom_id, unfinished.code, unfinished.message)
                    + b"\n"
                )
            results.write(line)
            if is_success(status) and good is not None:
                good.write(line)
            else:
                errors.write(line)
    share_output(data, errors_id)
    if num_good:
        share_output(data, output_id)
        share_results(data, batch)
    return Published(
        _record(output_id, output_path, "output", batch, now) if num_good else None,
        _record(errors_id, errors_path, "errors", batch, now),
    )


def _line(log: ResultsLog, number: int) -> bytes:
    """The log may be from before line separators were escaped at their writing."""
    return escape_line_separators(log.read(number)) + b"\n"


def _same_file(existing: Path, name: Path) -> None:
    """Give a file a second name. Each can be deleted without the other."""
    name.unlink(missing_ok=True)
    os.link(existing, name)
    sync_dir(name.parent)


def _record(file_id: str, path: Path, kind: str, batch: Batch, now: datetime) -> StoredFile:
    return StoredFile(
        id=file_id,
        purpose=FilePurpose.BATCH_OUTPUT,
        filename=f"{batch.id}_{kind}.jsonl",
        size_bytes=path.stat().st_size,
        created_at=now,
        expires_at=(
            now + timedelta(seconds=batch.output_expires_after_s)
            if batch.output_expires_after_s
            else None
        ),
        owner=batch.owner,
    )
