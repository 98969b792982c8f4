"""Validation and housekeeping, one step at a time: what a crash beside them leaves to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_app.background import BackgroundThread
from batch_app.core import BatchStatus
from batch_app.failure_policy import MAX_UNKNOWN
from batch_app.validation import LEASE_S, Validation
from support.sdk import CHAT, jsonl, lines
from support.stories import Crash, World
from support.waiting import wait_for


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with World(tmp_path) as world:
        yield world


def create(world: World, content: bytes | None = None) -> str:
    raw = jsonl(lines(3)) if content is None else content
    form: dict[str, Any] = {"files": {"file": ("in.jsonl", raw)}, "data": {"purpose": "batch"}}
    file_id = world.client.post("/v1/files", **form).json()["id"]
    wish = {"input_file_id": file_id, "endpoint": CHAT}
    batch_id = world.client.post("/v1/batches", json=wish).json()["id"]
    assert isinstance(batch_id, str)
    return batch_id


def get(world: World, batch_id: str) -> dict[str, Any]:
    body: dict[str, Any] = world.client.get(f"/v1/batches/{batch_id}").json()
    return body


def validation(world: World, **changes: Any) -> Validation:
    own = world.services
    work = Validation(own.settings, own.data, own.store, lambda: own.registry, "server", own.clock)
    return replace(work, **changes)


def dies(*_: object) -> None:
    raise Crash


def test_what_a_dead_worker_did_not_tell_is_counted_at_the_end(world: World) -> None:
    batch_id = create(world)
    world.validate()
    world.work(answers=2, event=dies, untold=True)
    assert get(world, batch_id)["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    world.client.post(f"/v1/batches/{batch_id}/cancel")
    assert not world.keep_house(), "the lease of the dead worker still holds"
    world.pass_time(world.settings.lease_s + 1)
    assert world.keep_house()
    batch = get(world, batch_id)
    assert (batch["status"], batch["request_counts"]["completed"]) == ("cancelled", 2)
    output = world.client.get(f"/v1/files/{batch['output_file_id']}/content").content
    assert len(output.splitlines()) == 2
    assert batch["usage"]["total_tokens"] > 0


def test_a_lost_index_is_made_anew_for_the_end(world: World) -> None:
    batch_id = create(world)
    world.validate()
    (world.data.work_dir(batch_id) / "index.bin").unlink()
    world.client.post(f"/v1/batches/{batch_id}/cancel")
    world.keep_house()
    errors = get(world, batch_id)["error_file_id"]
    assert len(world.client.get(f"/v1/files/{errors}/content").content.splitlines()) == 3


def test_a_worker_leaves_what_was_cancelled_during_the_check(world: World) -> None:
    batch_id = create(world, b"no JSON\n")
    world.client.post(f"/v1/batches/{batch_id}/cancel")
    assert world.work() is None
    world.keep_house()
    assert get(world, batch_id)["status"] == "cancelled"


def test_a_check_is_given_back_when_the_server_stops(world: World) -> None:
    batch_id = create(world)
    assert not validation(world, stopping=lambda: True).run_once()
    assert get(world, batch_id)["status"] == "validating"
    assert list(world.data.incoming.iterdir()) == []
    assert validation(world).run_once(), "the next server begins at once"
    assert get(world, batch_id)["status"] == "in_progress"


def test_a_check_cut_off_begins_anew_when_its_lease_has_run_out(world: World) -> None:
    batch_id = create(world)
    world.validate(dies_before=BatchStatus.QUEUED)
    assert not world.validate()
    world.pass_time(LEASE_S + 1)
    assert world.validate()
    assert get(world, batch_id)["status"] == "in_progress"


def test_a_long_check_keeps_its_lease(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_app.validation.RENEW_EVERY_S", 0.0)
    monkeypatch.setattr("batch_app.intake.READ_BYTES", 100)
    batch_id = create(world, jsonl(lines(20)))
    looks = 0

    def stopping() -> bool:
        """Time passes with every piece that is read, and another server tries to get the batch."""
        nonlocal looks
        looks += 1
        if looks > 1:
            world.pass_time(LEASE_S / 2)
            assert world.store.claim_to_validate("another", LEASE_S, world.now) is None
        return False

    assert validation(world, stopping=stopping).run_once()
    assert looks > 20
    assert get(world, batch_id)["status"] == "in_progress"


def test_input_bytes_that_are_gone_are_waited_for(world: World) -> None:
    batch_id = create(world)
    path = world.data.input_file(get(world, batch_id)["input_file_id"])
    kept = path.rename(path.with_suffix(".kept"))
    with pytest.raises(FileNotFoundError, match="not where they belong"):
        world.validate()
    batch = get(world, batch_id)
    assert (batch["status"], batch["paused"]["kind"]) == ("validating", "disk")
    assert not world.validate(), "not before its time"
    kept.rename(path)
    world.pass_time(2)
    assert world.validate()
    assert get(world, batch_id)["status"] == "in_progress"


def test_a_check_that_is_impossible_ends_with_the_completion_window(world: World) -> None:
    batch_id = create(world)
    world.data.input_file(get(world, batch_id)["input_file_id"]).unlink()
    world.pass_time(25 * 3600)
    with pytest.raises(FileNotFoundError):
        world.validate()
    batch = get(world, batch_id)
    assert batch["status"] == "failed"
    assert "upload the file again" in batch["errors"]["data"][0]["message"]


def test_a_defect_fails_a_check_after_five_pauses(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a prompt, perhaps")

    monkeypatch.setattr("batch_app.validation.index_file", broken)
    batch_id = create(world)
    for _ in range(MAX_UNKNOWN + 1):
        assert get(world, batch_id)["status"] == "validating"
        with pytest.raises(KeyError):
            world.validate()
        world.pass_time(60)
    failed = get(world, batch_id)
    assert failed["status"] == "failed"
    message = failed["errors"]["data"][0]["message"]
    assert message.startswith("Internal error (KeyError, test_background_work.py:")
    assert f"vllm-batch retry {batch_id}" in message


def test_a_defect_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def work() -> bool:
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("a defect")
        return False

    thread = BackgroundThread("work", work, every_s=0.01)
    thread.start()
    try:
        wait_for(lambda: "work failed" in caplog.text, what="it is said")
        thread.wake()
        wait_for(lambda: len(calls) > 1, what="it goes on")
    finally:
        thread.stop(5)
