"""The results log: what counts, what a crash may do to it, and who may write."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_app import results
from batch_app.core import FinishReason, FinishReasonCounts, Progress, TokenCounts
from batch_app.errors import ResultsLogError, StorageFull
from batch_app.results import HEADER_BYTES, ResultsLog, iter_results, live_segments

TOKENS = TokenCounts(prompt_tokens=3, completion_tokens=2, cached_tokens=1)


def line(number: int) -> bytes:
    return orjson.dumps({"custom_id": f"r{number}", "text": "x" * (number % 7)})


def fill(log: ResultsLog, numbers: range | list[int], status: int = 200) -> None:
    for number in numbers:
        log.append(number, status, TOKENS, line(number))
    log.commit()


def reopen(folder: Path, num_requests: int, epoch: int) -> ResultsLog:
    return ResultsLog(folder, num_requests, epoch)


def test_committed_results_survive_and_appended_ones_do_not(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 10, epoch=1)
    fill(log, [3, 1])
    log.append(5, 200, TOKENS, line(5))
    log.close()  # as a crash would, before the commit

    again = reopen(tmp_path, 10, epoch=2)
    assert again.todo().tolist() == [0, 2, 4, 5, 6, 7, 8, 9]
    assert again.read(3) == line(3)
    assert again.read(1) == line(1)
    assert again.progress.completed == 2
    assert again.progress.tokens == TOKENS + TOKENS
    again.close()


def test_finish_reasons_are_counted_once_whatever_happens(tmp_path: Path) -> None:
    reasons = [None, *FinishReason]
    log = ResultsLog(tmp_path, 40, epoch=1)
    for number in range(12):
        log.append(number, 200, TOKENS, line(number), number % 2 == 0, reasons[number % 6])
    wanted = FinishReasonCounts(2, 2, 2, 2, 2)
    assert log.commit().finish_reasons == wanted
    assert log.progress.deduplicated == 6
    # A failure has no answer, and a request that is answered again keeps its first one.
    log.append(12, 500, TOKENS, line(12), False, FinishReason.LENGTH)
    log.append(0, 200, TOKENS, line(0), False, FinishReason.LENGTH)
    assert log.commit().finish_reasons == wanted
    # What wasn't committed before a crash doesn't count; it will be run again.
    log.append(20, 200, TOKENS, line(20), False, FinishReason.LENGTH)
    log.close()

    for epoch in (2, 3):
        log = reopen(tmp_path, 40, epoch=epoch)
        assert log.progress.finish_reasons == wanted
        assert (log.progress.completed, log.progress.failed) == (12, 1)
        assert [log.finish_reason(number) for number in range(12)] == reasons * 2
        assert {log.status_code(number) for number in range(12)} == {200}
        log.close()


@pytest.mark.parametrize("status", [100, 200, 307, 599, 999])
@pytest.mark.parametrize("copied", [True, False])
def test_a_frame_keeps_apart_what_shares_a_field(tmp_path: Path, status: int, copied: bool) -> None:
    log = ResultsLog(tmp_path, 6, epoch=1)
    for number, reason in enumerate([None, *FinishReason]):
        log.append(number, status, TOKENS, line(number), copied, reason)
    log.commit()
    log.close()
    again = reopen(tmp_path, 6, epoch=2)
    assert [again.status_code(number) for number in range(6)] == [status] * 6
    assert [again.finish_reason(number) for number in range(6)] == [None, *FinishReason]
    assert again.progress.deduplicated == 6 * copied
    assert (again.progress.completed == 6) == (status == 200)
    again.close()


def test_a_log_from_before_finish_reasons_is_read(tmp_path: Path) -> None:
    """Its frames have nothing where the reasons stand now."""
    log = ResultsLog(tmp_path, 2, epoch=1)
    head = struct.pack("<4sIHIIIII", b"vbr1", 1, 0x8000 | 200, 3, 2, 1, 0, len(line(1)))
    crc = struct.pack("<I", zlib.crc32(line(1), zlib.crc32(head)))
    log.close()
    (path,) = tmp_path.glob("results-*.log")
    with path.open("ab") as file:
        file.write(head + crc + line(1))
    again = reopen(tmp_path, 2, epoch=2)
    assert (again.status_code(1), again.finish_reason(1)) == (200, None)
    assert again.progress == Progress(1, 0, TOKENS, 1)
    again.close()


def test_failed_results_are_counted_apart_and_keep_their_status(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 3, epoch=1)
    fill(log, [0])
    fill(log, [1], status=400)
    assert (log.progress.completed, log.progress.failed) == (1, 1)
    assert [log.status_code(number) for number in range(3)] == [200, 400, 0]
    log.close()
    again = reopen(tmp_path, 3, epoch=2)
    assert (again.progress.completed, again.progress.failed) == (1, 1)
    again.close()


def test_a_second_result_of_a_request_is_dropped(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 2, epoch=1)
    fill(log, [0])
    log.append(0, 500, TOKENS, b'{"another":1}')
    log.commit()
    assert log.read(0) == line(0)
    assert log.progress.done == 1
    log.close()
    assert list(iter_results(tmp_path)) == [line(0)]


def test_a_tail_torn_at_any_byte_loses_only_the_torn_frame(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 4, epoch=1)
    fill(log, [0, 1])
    before = live_segments(tmp_path)[0].length
    fill(log, [2])
    log.close()
    path = live_segments(tmp_path)[0].path
    whole = path.read_bytes()
    for end in range(before, len(whole)):
        folder = tmp_path / f"cut-{end}"
        folder.mkdir()
        (folder / path.name).write_bytes(whole[:end])
        again = reopen(folder, 4, epoch=2)
        assert again.todo().tolist() == [2, 3], f"cut at {end} of {len(whole)}"
        fill(again, [2])
        assert again.read(2) == line(2)
        again.close()
        assert sorted(iter_results(folder)) == sorted(line(n) for n in range(3))


def test_a_flipped_byte_anywhere_costs_only_its_own_request(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 5, epoch=1)
    fill(log, [0, 1, 2, 3, 4])
    log.close()
    path = live_segments(tmp_path)[0].path
    whole = path.read_bytes()
    ends = []
    for frame, _ in results._Scan(path, None):
        ends.append((frame.offset - HEADER_BYTES, frame.offset + frame.length, frame.number))
    for begin, end, number in ends[1:]:  # the first is the seal
        for position in range(begin, end):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            segments = live_segments(tmp_path)
            scan = results._Scan(path, segments[-1].length)
            assert [f.number for f, _ in scan] == [0xFFFFFFFF] + [
                n for n in range(5) if n != number
            ], f"byte {position}"
    path.write_bytes(whole)


def test_what_a_former_owner_still_writes_does_not_count(tmp_path: Path) -> None:
    stale = ResultsLog(tmp_path, 6, epoch=1)
    fill(stale, [0])
    owner = ResultsLog(tmp_path, 6, epoch=2)
    fill(stale, [1])  # woken up again, unaware
    fill(owner, [2])
    assert owner.todo().tolist() == [1, 3, 4, 5]
    owner.close()
    # Even when it begins another segment, and even for a third claim.
    stale.close()
    stale_again = ResultsLog(tmp_path, 6, epoch=1)
    fill(stale_again, [3])
    stale_again.close()
    third = ResultsLog(tmp_path, 6, epoch=3)
    assert third.todo().tolist() == [1, 3, 4, 5]
    third.close()
    assert sorted(iter_results(tmp_path)) == [line(0), line(2)]


def test_a_claim_that_died_before_its_seal_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path, 3, epoch=1)
    fill(log, [0, 2])
    log.close()
    (tmp_path / "results-00000002-0001.log").write_bytes(b"vbr1\x00")
    again = ResultsLog(tmp_path, 3, epoch=3)
    assert again.todo().tolist() == [1]
    again.close()


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, StorageFull), (errno.EIO, ResultsLogError)]
)
def test_a_failed_fsync_is_final_for_its_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    log = ResultsLog(tmp_path, 4, epoch=1)
    fill(log, [0])

    def failing(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    log.append(1, 200, TOKENS, line(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", failing)
        with pytest.raises(expected):
            log.commit()
    with pytest.raises(ResultsLogError):
        log.commit()  # never again as if it had worked
    assert not log.is_done(1)
    log.close()
    again = ResultsLog(tmp_path, 4, epoch=1)
    assert again.todo().tolist() == [1, 2, 3]
    again.close()


@settings(max_examples=200, deadline=None)
@given(junk=st.binary(max_size=400), cut=st.integers(min_value=0, max_value=400))
def test_any_bytes_in_a_segment_are_survived(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    log = ResultsLog(folder, 3, epoch=1)
    fill(log, [0, 1])
    log.close()
    path = live_segments(folder)[0].path
    path.write_bytes(path.read_bytes()[: 400 - cut] + junk)
    again = ResultsLog(folder, 3, epoch=2)
    for number in range(3):
        if again.is_done(number):
            assert again.read(number) == line(number)
    again.close()


def test_large_logs_are_scanned_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_SCAN_BYTES", 64)
    log = ResultsLog(tmp_path, 200, epoch=1)
    fill(log, range(200))
    log.close()
    assert list(iter_results(tmp_path)) == [line(number) for number in range(200)]


@pytest.mark.parametrize("count", [-35, 2**32, 2**70])
def test_a_count_that_no_frame_can_hold_costs_no_result(tmp_path: Path, count: int) -> None:
    log = ResultsLog(tmp_path, 1, epoch=1)
    log.append(0, 200, TokenCounts(count, 5, count, count), b"{}")
    progress = log.commit()
    log.close()
    nearest = min(max(count, 0), 2**32 - 1)
    assert progress.tokens == TokenCounts(nearest, 5, nearest, nearest)
    again = ResultsLog(tmp_path, 1, epoch=2)
    assert (again.progress, again.num_damaged) == (progress, 0)
    again.close()
