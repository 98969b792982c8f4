"""The next model's files are read ahead, when the present one is nearly done, and only then."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from batch_app.engine import prefetch
from batch_app.engine.prefetch import Prefetch, local_files
from batch_app.index import DTYPE, Index
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.warmup import AHEAD_S, STAND_BY_S, Warmup

NUM_BYTES = 4 << 20


def model_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(os.urandom(NUM_BYTES))
        os.fsync(file.fileno())
    return folder


def share_in_cache(path: Path) -> float:
    """How much of a file could be read without waiting for the disk."""
    page = os.sysconf("SC_PAGESIZE")
    with path.open("rb", buffering=0) as file:
        found = 0
        for offset in range(0, NUM_BYTES, page):
            try:
                found += os.preadv(file.fileno(), [bytearray(page)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
    return found / NUM_BYTES


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_weights_come_into_the_file_cache(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    deadline = time.monotonic() + 60  # pages that are still being written stay
    try:
        while share_in_cache(weights) > 0.5:
            if time.monotonic() > deadline:
                pytest.skip("this file system keeps everything in memory")
            forget(weights)
    except OSError:
        pytest.skip("this file system can't tell what is in the cache")
    reader = Prefetch()
    assert reader.start(folder) == NUM_BYTES
    assert reader.wait(120)
    assert share_in_cache(weights) == 1.0


def test_not_what_memory_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LARGEST_SHARE", 1e-9)
    assert Prefetch().start(model_folder(tmp_path / "m")) == 0


def test_nothing_to_read(tmp_path: Path) -> None:
    assert Prefetch().start(tmp_path) == 0
    assert Prefetch().start(tmp_path / "nowhere") == 0


def test_it_can_be_stopped(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    os.mkfifo(folder / "a.bin")  # to open it would wait for ever; it isn't weights
    reader = Prefetch()
    for _ in range(3):
        assert reader.start(folder) == NUM_BYTES
    reader.stop()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_where_a_model_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = model_folder(tmp_path / "m")
    assert local_files(ModelEntry(name="m", source=str(folder))) == folder
    hub = ModelEntry(name="h", source="some/model")
    assert local_files(hub) is None
    model = tmp_path / "hub" / "models--some--model"
    snapshot = model_folder(model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    assert local_files(hub) == snapshot
    assert local_files(hub.model_copy(update={"revision": "abc"})) == snapshot
    assert local_files(hub.model_copy(update={"revision": "other"})) is None
    assert local_files(hub.model_copy(update={"engine": "sim"})) is None


class Group:
    """A group of a thousand requests whose time is the test's."""

    def __init__(self, tmp_path: Path) -> None:
        self.now = 0.0
        self.next_model: str | None = None
        self.num_asked = 0
        self.said: list[str] = []
        self.standing_by: list[tuple[float, str]] = []
        entries = [
            ModelEntry(name=name, source=str(model_folder(tmp_path / name))) for name in "abc"
        ]
        self.prefetch = Prefetch()
        self.warmup = Warmup(
            prefetch=self.prefetch,
            registry=ModelRegistry(entries),
            current=entries[0],
            num_requests=1000,
            next_model=self._ask,
            say=self.said.append,
            stand_by=self._stand_by,
            clock=lambda: self.now,
        )

    def _ask(self) -> str | None:
        self.num_asked += 1
        return self.next_model

    def _stand_by(self, entry: ModelEntry) -> bool:
        if self.standing_by:
            return False
        self.standing_by.append((self.now, entry.name))
        return True

    def pass_time(self, seconds: int, per_second: int) -> None:
        for _ in range(seconds):
            self.warmup.delivered(per_second)
            self.now += 1.0


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_it_begins_when_the_end_is_near(group: Group) -> None:
    group.next_model = "b"
    group.pass_time(100, 2)  # 800 left at 2 a second
    assert group.said == []
    assert group.num_asked == 0
    group.pass_time(290, 2)
    [said] = group.said
    assert "Reading the weights of b ahead" in said
    assert group.num_asked <= AHEAD_S + 2
    group.next_model = "c"  # one of higher priority has come
    group.pass_time(2, 2)
    assert "Reading the weights of c ahead" in group.said[-1]
    group.prefetch.stop()


def test_a_process_for_the_next_engine_is_started_once_and_late(group: Group) -> None:
    group.next_model = "b"
    group.pass_time(499, 2)
    [(at_s, name)] = group.standing_by
    assert name == "b"
    assert 500 - STAND_BY_S - 3 <= at_s <= 500 - STAND_BY_S + 3
    assert [said for said in group.said if "engine process for b" in said]
    group.prefetch.stop()


@pytest.mark.parametrize("following", [None, "a", "unknown"])
def test_nothing_to_begin_with(group: Group, following: str | None) -> None:
    group.next_model = following
    group.pass_time(10, 99)
    assert group.num_asked > 0
    assert group.said == []
    assert group.standing_by == []


def test_the_models_that_still_have_requests_in_the_order_of_the_file() -> None:
    records = np.zeros(6, dtype=DTYPE)
    records["model"] = [2, 0, 1, 2, 0, 1]
    index = Index(records, np.zeros(0, np.uint32), ("a", "b", "c"), ("/v1/chat/completions",))
    assert index.models_of(np.arange(6)) == ["a", "b", "c"]
    assert index.models_of(np.array([0, 1, 3])) == ["a", "c"]
    assert index.models_of(np.arange(0)) == []
