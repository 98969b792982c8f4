"""Files that several machines share: what is put and fetched, swept and evicted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_app import shared_files
from batch_app.cache import evict
from batch_app.core import Batch, FilePurpose, StoredFile, utc_now
from batch_app.files import DataDir, new_id
from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.object_sweep import SITE, remove_orphan_objects
from batch_app.objects import Objects
from batch_app.registry import ModelRegistry
from batch_app.shared_files import fetch_index, fetch_input, folder_id, in_order, share_log
from batch_app.store import Store
from integration.api_fixtures import input_file
from support.batches import a_batch

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def machines(tmp_path: Path, file_objects: Callable[[], Objects]) -> tuple[DataDir, DataDir]:
    both = DataDir(tmp_path / "a", file_objects()), DataDir(tmp_path / "b", file_objects())
    for data in both:
        data.create()
    return both


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    store.migrate()
    yield store
    store.close()


def a_file(purpose: FilePurpose = FilePurpose.BATCH) -> StoredFile:
    return StoredFile(new_id("file"), purpose, "a.jsonl", 4, LONG_AGO)


def batch_of(file: StoredFile) -> Batch:
    return a_batch(model="sim", input_file_id=file.id, created_at=LONG_AGO, total=3)


def names(data: DataDir, prefix: str = "") -> set[str]:
    assert data.objects is not None
    areas = (prefix,) if prefix else ("input", "output", "index", "results", "logs", "uploads")
    return {found.name for area in areas for found in data.objects.list(area)}


def put(data: DataDir, *some: str) -> None:
    assert data.objects is not None
    for name in some:
        data.objects.put(name, b"text")


# -- sharing ---------------------------------------------------------------------------------------


def test_a_file_and_its_index_reach_another_machine(
    machines: tuple[DataDir, DataDir], tmp_path: Path
) -> None:
    here, there = machines
    (tmp_path / "models.toml").write_text('[[model]]\nname = "sim"\nsource = "sim"\nengine = "sim"')
    file = a_file()
    here.input_file(file.id).write_bytes(input_file(50))
    batch = batch_of(file)
    here.work_dir(batch.id).mkdir()
    rules = IntakeRules(ModelRegistry.load(tmp_path / "models.toml"), model="sim")
    index_file(here.input_file(file.id), here.work_dir(batch.id), rules)
    shared_files.share_input(here, file.id)
    shared_files.share_index(here, batch.id)

    blocks: list[None] = []
    path = fetch_input(there, file.id, lambda: blocks.append(None))
    assert path.read_bytes() == input_file(50)
    assert blocks
    index = Index.load(fetch_index(there, batch.id))
    assert (index.records == Index.load(here.work_dir(batch.id)).records).all()
    assert list(there.incoming.iterdir()) == []

    shared_files.remove_work(there, batch.id)
    assert not there.work_dir(batch.id).exists()
    assert names(here) == {f"input/{file.id}.jsonl"}


def test_what_nobody_has(machines: tuple[DataDir, DataDir]) -> None:
    with pytest.raises(FileNotFoundError):
        fetch_input(machines[0], new_id("file"))
    batch_id = new_id("batch")
    assert list(fetch_index(machines[0], batch_id).iterdir()) == []  # it is made anew
    assert list((machines[0].batches / "input").iterdir()) == []


def test_a_transfer_that_is_ended_leaves_nothing(machines: tuple[DataDir, DataDir]) -> None:
    here, there = machines
    file = a_file()
    put(here, f"input/{file.id}.jsonl")

    def end() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        fetch_input(there, file.id, end)
    assert list((there.batches / "input").iterdir()) == []


def test_without_a_store_nothing_is_fetched(tmp_path: Path) -> None:
    data = DataDir(tmp_path)
    data.create()
    file = a_file()
    assert fetch_input(data, file.id) == data.input_file(file.id)
    shared_files.share_input(data, file.id)
    shared_files.share_index(data, new_id("batch"))
    shared_files.remove_work(data, new_id("batch"))


def test_the_log_of_several_machines_is_one(machines: tuple[DataDir, DataDir]) -> None:
    batch_id = new_id("batch")
    lines = [f"2026-01-01 00:00:0{n}Z  line {n}\n" for n in range(6)]
    for data, some in zip(machines, (lines[0::2], lines[1::2]), strict=True):
        data.log_file(batch_id).write_text("".join(some) + "cut off")
        share_log(data, batch_id)
    for data in machines:
        logs = shared_files.fetch_logs(data, batch_id)
        assert len(logs) == 2
        assert in_order(logs.values()).decode() == "".join(lines)
    assert folder_id(machines[0]) == folder_id(machines[0]) != folder_id(machines[1])


# -- the sweep -------------------------------------------------------------------------------------


def test_the_sweep_removes_what_nothing_needs(
    machines: tuple[DataDir, DataDir], store: Store
) -> None:
    data = machines[0]
    kept, deleted, unknown = a_file(), a_file(), a_file()
    running, ended = batch_of(kept), batch_of(kept)
    store.add_file(deleted)
    store.add_batch(running, kept)
    store.add_batch(ended)
    store.cancel_queued(ended.id, utc_now())
    store.delete_file(deleted.id, utc_now())
    stays = {
        f"input/{kept.id}.jsonl",
        f"index/{running.id}.tar",
        f"results/{running.id}/results-00000001-0001/{0:016d}",
        f"logs/{running.id}/a.log",
        f"logs/{ended.id}/a.log",
    }
    goes = {
        f"input/{deleted.id}.jsonl",
        f"index/{ended.id}.tar",
        f"results/{ended.id}/results-00000001-0001/{0:016d}",
        f"output/{ended.id}.7.jsonl",
    }
    young = {
        f"input/{unknown.id}.jsonl",
        f"output/{unknown.id}.jsonl",
        f"index/{new_id('batch')}.tar",
        f"uploads/{new_id('upload')}/{new_id('part')}",
        f"logs/{new_id('batch')}/a.log",
    }
    put(data, *stays, *goes, *young)
    assert remove_orphan_objects(data, store) == 0  # it writes down whose they are
    assert remove_orphan_objects(data, store) == len(goes)
    assert names(data) == stays | young
    assert remove_orphan_objects(data, store, older_than_s=-3600) == len(young)
    assert names(data) == stays
    later = utc_now() + timedelta(days=1)
    assert remove_orphan_objects(data, store, logs_ended_before=later) == 1
    assert names(data) == stays - {f"logs/{ended.id}/a.log"}


def test_nothing_of_another_site_is_swept(
    machines: tuple[DataDir, DataDir], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    data = machines[0]
    assert data.objects is not None
    put(data, f"input/{new_id('file')}.jsonl")
    assert remove_orphan_objects(data, store, older_than_s=-3600) == 0  # a database without files
    data.objects.put(SITE, new_id("file").encode())
    store.add_file(a_file())
    with caplog.at_level(logging.ERROR):
        assert remove_orphan_objects(data, store, older_than_s=-3600) == 0
    assert "another database" in caplog.text
    assert len(names(data)) == 1


# -- the cache -------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(machines: tuple[DataDir, DataDir]) -> None:
    data = machines[0]
    files = [a_file() for _ in range(4)]
    for age, file in enumerate(files):
        put(data, f"input/{file.id}.jsonl")
        path = fetch_input(data, file.id)
        used = time.time() - 10_000 + 1000 * age
        os.utime(path, (used, used))
    fetch_input(data, files[0].id)  # used just now
    assert evict(data, 8) == 2
    left = [file for file in files if data.input_file(file.id).exists()]
    assert left == [files[0], files[3]]
    assert evict(data, 1) == 1
    assert data.input_file(files[0].id).exists()  # perhaps about to be opened
    assert evict(data, 0, in_use_s=0) == 0  # no limit
    assert fetch_input(data, files[1].id).read_bytes() == b"text"


def test_what_the_store_lacks_is_never_evicted(machines: tuple[DataDir, DataDir]) -> None:
    data = machines[0]
    alone, longer = a_file(), a_file()
    data.input_file(alone.id).write_bytes(b"only here")
    data.input_file(longer.id).write_bytes(b"text and more")
    put(data, f"input/{longer.id}.jsonl")
    assert evict(data, 1, in_use_s=-1) == 0


def test_a_file_under_two_names_goes_with_both(machines: tuple[DataDir, DataDir]) -> None:
    data = machines[0]
    output = a_file(FilePurpose.BATCH_OUTPUT)
    batch = replace(batch_of(a_file()), output_file_id=output.id)
    data.output_file(output.id).write_bytes(b"text")
    os.link(data.output_file(output.id), data.results_file(batch))
    shared_files.share_output(data, output.id)
    assert evict(data, 3, in_use_s=-1) == 2
    path = shared_files.fetch_results_file(data, batch)
    assert path.read_bytes() == b"text"
    assert [one.name for one in (data.batches / "output").iterdir()] == [path.name]
