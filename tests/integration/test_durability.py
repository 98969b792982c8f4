"""What is promised is on the disk before it is promised: bytes, and the names that lead to them.

A killed process shows nothing of this, since what the system has taken is still written. So the
calls are watched here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import TokenCounts
from batch_app.database import connect
from batch_app.results import ResultsLog, live_segments
from batch_app.suspects import Suspects
from batch_app.worker import Worker
from integration.api_fixtures import Api, request_line
from support.site import Site, echo_line


class Disk:
    """Which files and folders were synced, and when names in a folder changed, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._events: list[tuple[str, int, int]] = []  # what, inode, size
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._syncs(getattr(os, name)))
        for name in ("replace", "rename", "link"):
            monkeypatch.setattr(os, name, self._names(getattr(os, name)))

    def _syncs(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            call(descriptor)
            stat = os.fstat(descriptor)
            self._events.append(("sync", stat.st_ino, stat.st_size))

        return synced

    def _names(self, call: Callable[..., None]) -> Callable[..., None]:
        def named(source: Any, target: Any, **options: Any) -> None:
            call(source, target, **options)
            self._events.append(("name", Path(target).parent.stat().st_ino, 0))

        return named

    def lacks(self, *paths: Path) -> list[str]:
        """What a power loss could take of these now."""
        lost = []
        for path in paths:
            stat, folder = path.stat(), path.parent.stat().st_ino
            events = list(enumerate(self._events))
            sizes = [
                size for _, (what, inode, size) in events if (what, inode) == ("sync", stat.st_ino)
            ]
            named = [at for at, (what, inode, _) in events if (what, inode) == ("name", folder)]
            synced = [at for at, (what, inode, _) in events if (what, inode) == ("sync", folder)]
            if path.is_file() and sizes[-1:] != [stat.st_size]:
                lost.append(f"the bytes of {path.name}")
            if max(synced, default=-1) < max(named, default=0):
                lost.append(f"the name of {path.name}")
        return lost


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("model_first", [True, False])
def test_a_batch_before_it_is_in_the_store(
    api: Api, disk: Disk, monkeypatch: pytest.MonkeyPatch, model_first: bool
) -> None:
    lost: list[list[str]] = []
    add_batch = api.store.add_batch

    def look(batch: Any, file: Any, *given: Any, **named: Any) -> Any:
        folder = api.data.work_dir(batch.id)
        index = [folder / name for name in ("index.bin", "prefixes.bin", "index.json")]
        lost.append(disk.lacks(api.data.input_file(file.id), folder, *index))
        return add_batch(batch, file, *given, **named)

    monkeypatch.setattr(api.store, "add_batch", look)
    api.submitted(model_first=model_first)
    assert lost == [[]]


def test_files_and_parts_before_they_are_in_the_store(
    api: Api, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: dict[str, list[str]] = {}

    def watch(name: str, path_of: Callable[..., Path]) -> None:
        call = getattr(api.store, name)

        def look(*given: Any, **named: Any) -> Any:
            lost[name] = disk.lacks(path_of(*given))
            return call(*given, **named)

        monkeypatch.setattr(api.store, name, look)

    watch("add_file", lambda file: api.data.input_file(file.id))
    watch("add_part", lambda part: api.data.upload_dir(part.upload_id) / part.id)
    watch("complete_upload", lambda _, file: api.data.input_file(file.id))
    content = request_line()
    form: dict[str, Any] = {"files": {"file": content}, "data": {"purpose": "batch"}}
    assert api.call("POST", "/v1/files", **form).status_code == 200
    wish = {"filename": "a", "purpose": "batch", "bytes": len(content), "mime_type": "text/plain"}
    upload = f"/v1/uploads/{api.call('POST', '/v1/uploads', json=wish).json()['id']}"
    part = api.call("POST", f"{upload}/parts", files={"data": content}).json()["id"]
    done = api.call("POST", f"{upload}/complete", json={"part_ids": [part]})
    assert done.status_code == 200
    assert lost == {"add_file": [], "add_part": [], "complete_upload": []}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, commit_interval_s=0.02)
    yield site
    site.close()


def test_published_files_before_the_batch_has_ended(
    site: Site, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With failures, which makes three files, and without."""
    worker = Worker(site.settings, stop=threading.Event())
    transition = worker._store.transition
    lost: list[list[str]] = []
    num_files: list[int] = []

    def look(batch: Any, to: Any, now: Any, **values: Any) -> Any:
        if "new_files" in values:
            files = [site.data.output_file(file.id) for file in values["new_files"]]
            lost.append(disk.lacks(*files, site.data.results_file(batch)))
            num_files.append(len(files))
        return transition(batch, to, now, **values)

    monkeypatch.setattr(worker._store, "transition", look)
    too_long = echo_line(1) | {"body": {"messages": [{"role": "user", "content": "word " * 20}]}}
    for lines in ([echo_line(0)], [echo_line(0), too_long]):
        site.submit(lines, "tiny-context")
        batch = worker._claim()
        assert batch
        worker._work_on(batch)
    worker._slot.unload()
    worker._store.close()
    assert (num_files, lost) == ([1, 2], [[], []])


def test_results_before_they_count(tmp_path: Path, disk: Disk) -> None:
    for epoch in (1, 2):
        log = ResultsLog(tmp_path, 3, epoch)
        assert disk.lacks(live_segments(tmp_path)[-1].path) == [], "its seal, and its name"
        log.append(epoch, 200, TokenCounts(), b"{}")
        assert log.commit().done == epoch
        assert disk.lacks(live_segments(tmp_path)[-1].path) == []
        log.close()


def test_suspects_before_anything_else_is_tried(tmp_path: Path, disk: Disk) -> None:
    suspects = Suspects()
    suspects.died([1, 2], beside=True)
    suspects.save(tmp_path / "suspects.json")
    assert disk.lacks(tmp_path / "suspects.json") == []


def test_rows_before_a_transaction_has_ended(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.connect() as connection:
        said = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert said == {"synchronous": 2, "foreign_keys": 1, "busy_timeout": 15000}


def test_the_watch_itself_sees_what_is_missing(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    assert disk.lacks(path) == ["the bytes of a", "the name of a"]
    for each in (path, tmp_path):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    assert disk.lacks(path) == []
    path.rename(tmp_path / "b")
    assert disk.lacks(tmp_path / "b") == ["the name of b"]
    (tmp_path / "b").write_bytes(b"xy")
    assert disk.lacks(tmp_path / "b") == ["the bytes of b", "the name of b"]
