"""Why requests failed: grouped by error, with an example each. Reads a bounded part of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import orjson

from batch_app.batch_log import printable
from batch_app.core import Batch
from batch_app.results import iter_results
from batch_app.routes.downloads import has_failed, lines_of_file
from batch_app.routes.services import Services

#: What is read at most. A batch may have millions of failures; the first ones tell why.
MAX_FAILURES = 20_000
MAX_BYTES = 32 << 20
MAX_GROUPS = 20
MAX_CHARS = 300
_NUMBER = re.compile(r"\d+")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")


@dataclass(slots=True)
class FailureGroup:
    """Failures with the same status, code and message but for numbers and quotations."""

    status: int | None
    code: str
    message: str
    custom_id: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Failures:
    """The groups, most frequent first. `is_partial`: more was there than was read."""

    groups: tuple[FailureGroup, ...]
    num_read: int
    is_partial: bool


def failures_of(own: Services, batch: Batch) -> Failures:
    """Of a batch that the caller may see. Nothing where its files are gone; blocks."""
    if batch.progress.failed == 0 and batch.error_file_id is None:
        return Failures((), 0, False)
    try:
        return grouped(_lines(own, batch))
    except FileNotFoundError:
        return Failures((), 0, False)


def _lines(own: Services, batch: Batch) -> Iterator[bytes]:
    if not batch.is_terminal:
        return (line for line in iter_results(own.data.work_dir(batch.id)))
    if batch.error_file_id is None:
        return iter(())
    return lines_of_file(own.data.output_file(batch.error_file_id))


def grouped(lines: Iterable[bytes]) -> Failures:
    """Lines of results; those of requests that succeeded are passed over."""
    groups: dict[tuple[object, ...], FailureGroup] = {}
    num_read = num_bytes = 0
    is_partial = False
    for line in lines:
        num_bytes += len(line)
        if num_read >= MAX_FAILURES or num_bytes > MAX_BYTES:
            is_partial = True
            break
        if not has_failed(line):
            continue
        num_read += 1
        failure = _failure(line)
        key = (
            failure.status,
            failure.code,
            _NUMBER.sub("#", _QUOTED.sub("'…'", failure.message)),
        )
        known = groups.get(key)
        if known is not None:
            known.count += 1
        elif len(groups) < MAX_GROUPS:
            groups[key] = failure
        else:
            rest = FailureGroup(None, "others", "Of other kinds.", failure.custom_id, 0)
            groups.setdefault(("others",), rest).count += 1
    most = sorted(groups.values(), key=lambda group: -group.count)
    return Failures(tuple(most), num_read, is_partial)


def _failure(line: bytes) -> FailureGroup:
    result = orjson.loads(line)
    response = result.get("response")
    status, error = None, result.get("error")
    if response is not None:
        status, body = response.get("status_code"), response.get("body")
        error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        error = {}
    code = error.get("code")
    if not isinstance(code, str) or not code:
        code = error.get("type") or "unknown"
    return FailureGroup(
        status=status,
        code=_shown(code),
        message=_shown(error.get("message") or "No message."),
        custom_id=_shown(result.get("custom_id", "")),
    )


def _shown(value: object) -> str:
    """Without control characters and marks that make text read as another; cut to a length."""
    text = printable(str(value))
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"
