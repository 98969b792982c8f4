"""Copies of a results log: what a worker elsewhere finds, and what never counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from batch_app.batch_log import BatchLog
from batch_app.config import Settings
from batch_app.core import Batch, TokenCounts
from batch_app.errors import ObjectsUnavailable
from batch_app.files import DataDir
from batch_app.objects import Objects
from batch_app.result_copies import ResultCopies, fetch_results_log, results_so_far
from batch_app.results import ResultsLog, iter_results
from batch_app.shared_files import results_folder
from support.batches import running_batch

NUM_REQUESTS = 20


class Machine:
    """A data folder of its own, and the claims that a worker there makes of one batch."""

    def __init__(self, root: Path, objects: Objects, batch: Batch) -> None:
        self.data = DataDir(root, objects)
        self.data.create()
        self._batch = batch
        self.objects = objects

    def claim(self, epoch: int) -> Claim:
        batch = replace(self._batch, epoch=epoch)
        folder = self.data.work_dir(batch.id)
        folder.mkdir(exist_ok=True)
        copied = fetch_results_log(self.data, batch.id, folder)
        log = ResultsLog(folder, NUM_REQUESTS, epoch)
        batch_log = BatchLog(self.data.log_file(batch.id))
        copies = ResultCopies(self.data, batch, log, batch_log, Settings(), copied)
        return Claim(log, copies)

    def lose_everything(self) -> None:
        shutil.rmtree(self.data.root)
        self.data.create()

    def said(self) -> str:
        return self.data.log_file(self._batch.id).read_text()


class Claim:
    def __init__(self, log: ResultsLog, copies: ResultCopies) -> None:
        self.log, self.copies = log, copies

    def answer(self, *numbers: int, by: str) -> None:
        for number in numbers:
            self.log.append(number, 200, TokenCounts(), f"{number} by {by}".encode())
        self.log.commit()

    def copy(self) -> None:
        self.copies._try_to_copy()


@pytest.fixture
def batch() -> Batch:
    return running_batch(NUM_REQUESTS)


@pytest.fixture
def machines(
    tmp_path: Path, file_objects: Callable[[], Objects], batch: Batch
) -> tuple[Machine, Machine]:
    return (
        Machine(tmp_path / "a", file_objects(), batch),
        Machine(tmp_path / "b", file_objects(), batch),
    )


def test_another_machine_goes_on_from_what_was_copied(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    first = a.claim(1)
    first.answer(0, 1, 2, by="a")
    first.copy()
    first.answer(3, by="a")
    first.copy()
    first.answer(4, by="a")  # lost with its machine
    second = b.claim(2)
    assert [number for number in range(NUM_REQUESTS) if second.log.is_done(number)] == [0, 1, 2, 3]
    second.answer(4, by="b")
    assert second.log.read(3) == b"3 by a"
    assert second.log.read(4) == b"4 by b"


def test_what_a_stale_worker_still_sends_never_counts(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    stale = a.claim(1)
    stale.answer(0, by="a")
    stale.copy()
    second = b.claim(2)
    second.answer(1, by="b")
    second.copy()
    stale.answer(1, 2, by="a")
    stale.copy()
    a.lose_everything()
    third = a.claim(3)
    assert third.log.read(1) == b"1 by b"
    assert not third.log.is_done(2)


def test_the_machine_that_comes_back_keeps_what_only_it_has(
    machines: tuple[Machine, Machine],
) -> None:
    a, _ = machines
    first = a.claim(1)
    first.answer(0, by="a")
    first.copy()
    first.answer(1, by="a")
    second = a.claim(2)
    assert second.log.progress.done == 2
    second.copy()
    a.lose_everything()
    assert a.claim(3).log.progress.done == 2  # the rest of the first segment was copied, too


def test_a_segment_that_was_never_copied_is_run_again(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    first = a.claim(1)
    first.answer(0, 1, by="a")
    second = a.claim(2)
    second.answer(2, by="a")
    # Only the second one arrives, whose seal speaks of the first.
    a.objects.put(
        f"{results_folder(a._batch.id)}/results-00000002-0001/{0:016d}",
        (a.data.work_dir(a._batch.id) / "results-00000002-0001.log").read_bytes(),
    )
    log = b.claim(3).log
    assert [number for number in range(NUM_REQUESTS) if log.is_done(number)] == [2]


def test_a_gap_ends_what_counts(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    claim = a.claim(1)
    for number in range(4):
        claim.answer(number, by="a")
        claim.copy()
    names = sorted(found.name for found in a.objects.list("results"))
    assert len(names) == 4
    a.objects.delete([names[2]])
    assert b.claim(2).log.progress.done == 2


def test_a_part_is_sent_again_with_the_same_bytes(
    machines: tuple[Machine, Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an answer that was late could put an older, shorter part over a longer one."""
    a, b = machines
    claim = a.claim(1)
    claim.answer(0, by="a")
    sent: list[tuple[str, bytes]] = []

    def lost(name: str, content: bytes) -> None:
        sent.append((name, content))
        raise ObjectsUnavailable("The object storage does not answer.")

    with monkeypatch.context() as patched:
        patched.setattr(a.objects, "put", lost)
        claim.copy()
        claim.copy()
    assert a.said().count("Waiting for the object storage") == 1
    claim.answer(1, by="a")
    claim.copy()
    assert "The object storage answers again." in a.said()
    name, content = sent[0]
    assert a.objects.get(name) == content
    assert b.claim(2).log.progress.done == 2


def test_parts_that_overlap_say_the_same_once(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    claim = a.claim(1)
    claim.answer(0, 1, 2, by="a")
    whole = (a.data.work_dir(a._batch.id) / "results-00000001-0001.log").read_bytes()
    folder = f"{results_folder(a._batch.id)}/results-00000001-0001"
    for start, end in ((0, 60), (40, 90), (50, 55), (90, len(whole))):
        a.objects.put(f"{folder}/{start:016d}", whole[start:end])
    work_dir = b.data.work_dir(b._batch.id)
    b.claim(2)
    assert (work_dir / "results-00000001-0001.log").read_bytes() == whole


def test_results_so_far_from_elsewhere(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    claim = a.claim(1)
    claim.answer(0, 1, by="a")
    claim.copy()
    claim.answer(2, by="a")
    with results_so_far(b.data, b._batch) as folder:
        assert list(iter_results(folder)) == [b"0 by a", b"1 by a"]
    assert not folder.exists()
    with results_so_far(a.data, a._batch) as folder:
        assert len(list(iter_results(folder))) == 3
    assert folder.exists()


def test_the_thread_copies_and_says_its_last_word(machines: tuple[Machine, Machine]) -> None:
    a, b = machines
    claim = a.claim(1)
    claim.copies.start()
    claim.answer(0, by="a")
    claim.copies.stop()
    claim.copies.stop()
    assert b.claim(2).log.progress.done == 1
    ended = b.claim(3)
    ended.copies.start()
    ended.copies.end()
    ended.answer(1, by="b")
    ended.copies.stop()
    b.lose_everything()
    assert b.claim(4).log.progress.done == 1
