"""What is sent in pieces: results and logs, in memory that does not grow with them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator
from enum import StrEnum
from pathlib import Path

import anyio
from starlette.concurrency import run_in_threadpool

from batch_app.core import Batch
from batch_app.files import DataDir
from batch_app.json_lines import escape_line_separators
from batch_app.keys import Caller
from batch_app.result_copies import results_so_far
from batch_app.results import iter_results
from batch_app.routes.services import Services
from batch_app.shared_files import fetch_logs, in_order
from batch_app.wire.lines import has_failed

BLOCK_BYTES = 256 * 1024
FOLLOW_INTERVAL_S = 0.25
#: Where each look asks the object storage.
FOLLOW_SHARED_INTERVAL_S = 2.0
LAST_ROUNDS = 2


class ResultFilter(StrEnum):
    COMPLETED = "completed"
    FAILED = "failed"


def selected(lines: Iterable[bytes], wanted: ResultFilter | None) -> Iterator[bytes]:
    if wanted is None:
        yield from lines
        return
    for line in lines:
        if has_failed(line) == (wanted is ResultFilter.FAILED):
            yield line


def lines_of_file(path: Path) -> Iterator[bytes]:
    """The lines, without their line feeds."""
    with path.open("rb", buffering=BLOCK_BYTES) as file:
        for line in file:
            yield line.rstrip(b"\n")


def in_blocks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The lines as a file has them, in pieces large enough to be worth a switch of threads.

    Lines may be from before line separators were escaped at their writing."""
    block = bytearray()
    for line in lines:
        block += escape_line_separators(line)
        block += b"\n"
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def log_blocks(path: Path, tail: int | None) -> Iterator[bytes]:
    """A log as it is now; nothing where there is none."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return
    with path.open("rb") as file:
        position = 0 if tail is None else start_of_tail(file.fileno(), size, tail)
        while position < size:
            block = os.pread(file.fileno(), min(BLOCK_BYTES, size - position), position)
            if not block:
                return
            position += len(block)
            yield block


def start_of_tail(descriptor: int, size: int, num_lines: int) -> int:
    """Where the last lines begin, found from the end."""
    if num_lines == 0:
        return size
    wanted = num_lines + 1  # the last line feed ends the last line
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        block = os.pread(descriptor, end - start, start)
        if end == size and not block.endswith(b"\n"):
            wanted -= 1
        position = len(block)
        while (position := block.rfind(b"\n", 0, position)) >= 0:
            wanted -= 1
            if wanted == 0:
                return start + position + 1
        end = start
    return 0


async def follow_log(
    own: Services, asks: Caller, batch: Batch, path: Path, tail: int | None
) -> AsyncIterator[bytes]:
    """A log, and what is added to it, until the batch has finished or the server stops."""
    position = await run_in_threadpool(_start_of_following, path, tail)
    while True:
        # Asked before the read: what was written up to the end is then in it.
        ended = batch.is_terminal or own.stopping.is_set()
        block = await run_in_threadpool(_read_from, path, position)
        if block:
            position += len(block)
            yield block
        elif ended:
            return
        else:
            await anyio.sleep(FOLLOW_INTERVAL_S)
            batch = await run_in_threadpool(own.store.get_batch, batch.id, seen_by=asks)


async def follow_shared_log(
    own: Services, asks: Caller, batch: Batch, tail: int | None
) -> AsyncIterator[bytes]:
    """The same where machines write parts of it: what is new of each, as it is copied."""
    seen: dict[str, int] = {}
    rounds_left = LAST_ROUNDS
    while rounds_left:
        if batch.is_terminal or own.stopping.is_set():
            rounds_left -= 1  # its worker says its last word after the end
        logs = await run_in_threadpool(fetch_logs, own.data, batch.id)
        new = {name: log[seen.get(name, 0) :] for name, log in logs.items()}
        whole = {name: part[: part.rfind(b"\n") + 1] for name, part in new.items()}
        for name, part in whole.items():
            seen[name] = seen.get(name, 0) + len(part)
        block = in_order(whole.values())
        if tail is not None:
            block, tail = last_lines(block, tail), None
        if block:
            yield block
        if own.stopping.is_set():
            return
        await anyio.sleep(FOLLOW_SHARED_INTERVAL_S)
        batch = await run_in_threadpool(own.store.get_batch, batch.id, seen_by=asks)


def last_lines(log: bytes, num_lines: int | None) -> bytes:
    """All of them where the number is None."""
    if num_lines is None:
        return log
    return b"".join(log.splitlines(keepends=True)[-num_lines:]) if num_lines else b""


def lines_so_far(data: DataDir, batch: Batch) -> Iterator[bytes]:
    """The results of a batch that runs, as far as this machine can know them."""
    with results_so_far(data, batch) as folder:
        yield from iter_results(folder)


def _start_of_following(path: Path, tail: int | None) -> int:
    if tail is None or not path.exists():
        return 0
    with path.open("rb") as file:
        return start_of_tail(file.fileno(), path.stat().st_size, tail)


def _read_from(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            return os.pread(file.fileno(), BLOCK_BYTES, position)
    except FileNotFoundError:
        return b""
