"""The results log under damage: whatever is done to its bytes, no wrong line is ever read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.core import TokenCounts
from batch_app.errors import ResultsLogError
from batch_app.results import ResultsLog, encode_frame, iter_results, live_segments

CORPUS = Path(__file__).parents[1] / "faults" / "corpus" / "results"
NUM_REQUESTS = 6
TOKENS = TokenCounts(3, 2, 1, 0)


def line(number: int) -> bytes:
    return b'{"custom_id":"r%d","body":"%s"}' % (number, b"vbr1" * number)


def written(folder: Path, claims: list[list[int]]) -> list[Path]:
    """A log of several claims, each with these results. Returns its segments."""
    for epoch, numbers in enumerate(claims, start=1):
        log = ResultsLog(folder, NUM_REQUESTS, epoch)
        for number in numbers:
            log.append(number, 200, TOKENS, line(number))
        log.commit()
        log.close()
    return [segment.path for segment in live_segments(folder)]


def assert_nothing_wrong(folder: Path, epoch: int) -> set[int]:
    """Open the log as the next claim does. Returns which requests are done."""
    log = ResultsLog(folder, NUM_REQUESTS, epoch)
    done = {number for number in range(NUM_REQUESTS) if log.is_done(number)}
    assert {log.read(number) for number in done} == {line(number) for number in done}
    assert log.progress.done == len(done)
    # What was lost runs again, and then all is there.
    for number in log.todo().tolist():
        log.append(number, 200, TOKENS, line(number))
    assert log.commit().done == NUM_REQUESTS
    assert [log.read(number) for number in range(NUM_REQUESTS)] == [
        line(number) for number in range(NUM_REQUESTS)
    ]
    log.close()
    assert sorted(iter_results(folder)) == sorted(line(number) for number in range(NUM_REQUESTS))
    return done


CLAIMS = st.lists(
    st.lists(st.integers(0, NUM_REQUESTS - 1), max_size=4, unique=True), min_size=1, max_size=3
)


@given(claims=CLAIMS, data=st.data())
def test_a_byte_flipped_anywhere(
    tmp_path_factory: pytest.TempPathFactory, claims: list[list[int]], data: st.DataObject
) -> None:
    """In any segment, also in its seal: what is lost runs again, what is left is right."""
    folder = tmp_path_factory.mktemp("flip")
    path = data.draw(st.sampled_from(written(folder, claims)))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert_nothing_wrong(folder, len(claims) + 1)


@given(claims=CLAIMS, data=st.data())
def test_the_newest_segment_cut_anywhere(
    tmp_path_factory: pytest.TempPathFactory, claims: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    path = written(folder, claims)[-1]
    length = data.draw(st.integers(0, path.stat().st_size))
    os.truncate(path, length)
    done = assert_nothing_wrong(folder, len(claims) + 1)
    before = {number for numbers in claims[:-1] for number in numbers}
    assert before <= done, "a torn tail costs nothing that was committed by an earlier claim"


@given(claims=CLAIMS, junk=st.binary(min_size=1, max_size=300), data=st.data())
def test_bytes_put_in_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    claims: list[list[int]],
    junk: bytes,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    path = written(folder, claims)[-1]
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:position] + junk + content[position:])
    assert_nothing_wrong(folder, len(claims) + 1)


@pytest.mark.parametrize("entry", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_the_inputs_of_the_past(tmp_path: Path, entry: Path) -> None:
    """Alone, and behind a good log."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "results-00000001-0001.log").write_bytes(entry.read_bytes())
    assert_nothing_wrong(tmp_path / "alone", 2)
    (tmp_path / "behind").mkdir()
    path = written(tmp_path / "behind", [[0, 1, 2]])[0]
    with path.open("ab") as file:
        file.write(entry.read_bytes())
    assert {0, 1, 2} <= assert_nothing_wrong(tmp_path / "behind", 2)


@given(claims=CLAIMS, data=st.data())
def test_a_byte_flipped_while_the_log_is_open(
    tmp_path_factory: pytest.TempPathFactory, claims: list[list[int]], data: st.DataObject
) -> None:
    """What was good when it was written, or recovered, need not be so when it is published."""
    folder = tmp_path_factory.mktemp("open")
    written(folder, claims)
    log = ResultsLog(folder, NUM_REQUESTS, len(claims) + 1)
    for number in log.todo().tolist():
        log.append(number, 200, TOKENS, line(number))
    log.commit()
    path = data.draw(st.sampled_from([segment.path for segment in live_segments(folder)]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    said = 0
    for number in range(NUM_REQUESTS):
        try:
            assert log.read(number) == line(number)
            assert log.tokens(number) == TOKENS
        except ResultsLogError:
            said += 1
    assert said <= 1
    log.close()
    assert assert_nothing_wrong(folder, len(claims) + 2) <= set(range(NUM_REQUESTS))


def test_the_line_of_another_request_is_not_read_for_ours(tmp_path: Path) -> None:
    """A disk that puts a good block into the wrong place."""
    (path,) = written(tmp_path, [[0]])
    log = ResultsLog(tmp_path, NUM_REQUESTS, 2)
    frame = encode_frame(0, 200, TOKENS, line(0))
    other = encode_frame(1, 200, TOKENS, line(0))
    path.write_bytes(path.read_bytes().replace(frame, other))
    with pytest.raises(ResultsLogError, match="request 0"):
        log.read(0)
    log.close()


def test_a_segment_that_is_gone_is_said_and_not_passed_over(tmp_path: Path) -> None:
    first, _ = written(tmp_path, [[0, 1], [2]])
    first.unlink()
    with pytest.raises(ResultsLogError):
        ResultsLog(tmp_path, NUM_REQUESTS, 3)
