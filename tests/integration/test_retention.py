"""What is deleted in time, and what is kept because somebody needs it; with a clock to turn."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_app.core import Batch
from batch_app.files import DataDir, IncomingFolder
from support.sdk import CHAT, jsonl, line, lines
from support.stories import World

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(**settings: Any) -> World:
        worlds.append(World(tmp_path, **settings).__enter__())
        return worlds[-1]

    yield make
    for world in worlds:
        world.__exit__()


def upload(world: World, content: bytes | None = None, **form: Any) -> dict[str, Any]:
    raw = jsonl(lines(3)) if content is None else content
    answer = world.client.post(
        "/v1/files", files={"file": ("in.jsonl", raw)}, data={"purpose": "batch", **form}
    )
    return body(answer)


def body(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def create(world: World, file_id: str, **wish: Any) -> str:
    wish = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "30d", **wish}
    return str(body(world.client.post("/v1/batches", json=wish))["id"])


def get(world: World, batch_id: str) -> dict[str, Any]:
    return body(world.client.get(f"/v1/batches/{batch_id}"))


def run(world: World, content: bytes | None = None, **wish: Any) -> dict[str, Any]:
    """A finished batch."""
    batch_id = create(world, upload(world, content)["id"], **wish)
    world.validate()
    assert world.work() == batch_id
    return get(world, batch_id)


def file_status(world: World, file_id: str) -> tuple[int, int]:
    """What the API answers for a file, and for its content."""
    path = f"/v1/files/{file_id}"
    return world.client.get(path).status_code, world.client.get(f"{path}/content").status_code


def expires_at(world: World, file_id: str) -> int | None:
    found: int | None = body(world.client.get(f"/v1/files/{file_id}"))["expires_at"]
    listed = {file["id"]: file for file in body(world.client.get("/v1/files"))["data"]}
    assert listed[file_id]["expires_at"] == found
    return found


def test_results_go_in_time_and_not_before(
    make_world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(retention_output_s=7200)
    made_at = int(world.now.timestamp())
    bad = [*lines(2, "tiny-context"), line("long", "tiny-context", "word " * 9)]
    batch = run(world, jsonl(bad))
    published = [batch["output_file_id"], batch["error_file_id"]]
    for file_id in published:
        assert expires_at(world, file_id) == made_at + 7200
    world.pass_time(7200)
    world.keep_house()
    for file_id in published:
        assert file_status(world, file_id) == (200, 200)

    world.pass_time(1)
    with caplog.at_level(logging.INFO, "batch_app"):
        world.keep_house()
    for file_id in published:
        assert file_status(world, file_id) == (404, 404)
        assert f"Removed {file_id} (batch_output" in caplog.text
    assert world.client.get(f"/v1/batches/{batch['id']}/results").status_code == 404
    assert list((world.data.batches / "output").iterdir()) == []
    assert expires_at(world, batch["input_file_id"]) is None
    assert get(world, batch["id"])["status"] == "completed"
    assert world.client.get(f"/v1/batches/{batch['id']}/logs").text


def test_without_a_setting_everything_stays(make_world: Callable[..., World]) -> None:
    world = make_world()
    batch = run(world)
    world.pass_time(3650 * DAY_S)
    world.keep_house()
    for file_id in (batch["input_file_id"], batch["output_file_id"]):
        assert file_status(world, file_id) == (200, 200)
        assert expires_at(world, file_id) is None
    assert world.client.get(f"/v1/batches/{batch['id']}/logs").text


@pytest.mark.parametrize(("wished_s", "kept_s"), [(3600, 3600), (2592000, 7200)])
def test_the_earlier_end_holds(
    make_world: Callable[..., World], wished_s: int, kept_s: int
) -> None:
    world = make_world(retention_input_s=7200, retention_output_s=7200)
    made_at = int(world.now.timestamp())
    wish = {"anchor": "created_at", "seconds": wished_s}
    batch = run(world, output_expires_after=wish)
    form = {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(wished_s)}
    file = upload(world, **form)
    assert file["expires_at"] == made_at + kept_s
    for file_id in (file["id"], batch["output_file_id"]):
        assert expires_at(world, file_id) == made_at + kept_s
    world.pass_time(kept_s)
    world.keep_house()
    assert file_status(world, file["id"]) == (200, 200)
    world.pass_time(1)
    world.keep_house()
    for file_id in (file["id"], batch["output_file_id"]):
        assert file_status(world, file_id) == (404, 404)


def test_an_input_stays_through_the_whole_life_of_its_batch(
    make_world: Callable[..., World],
) -> None:
    world = make_world(retention_input_s=60)
    file_id, lonely = upload(world)["id"], upload(world)["id"]
    batch_id = create(world, file_id)

    def later(what: str) -> None:
        world.pass_time(DAY_S)
        world.keep_house()
        assert file_status(world, file_id) == (200, 200), what
        assert world.client.delete(f"/v1/files/{file_id}").status_code == 409, what

    later("validating")
    assert file_status(world, lonely) == (404, 404)
    world.validate()
    later("queued")

    def in_the_middle(batch: Batch, stop: threading.Event) -> None:
        later("running")
        stop.set()

    world.work(answers=1, event=in_the_middle)
    later("given back")
    world.client.post(f"/v1/batches/{batch_id}/cancel")
    assert world.data.input_file(file_id).exists()
    world.pass_time(1)
    world.keep_house()  # ends the batch, and has looked for expired files before or after
    world.keep_house()
    assert get(world, batch_id)["status"] == "cancelled"
    errors = get(world, batch_id)["error_file_id"]
    assert len(world.client.get(f"/v1/files/{errors}/content").text.splitlines()) == 2
    assert file_status(world, file_id) == (404, 404)
    assert not world.data.input_file(file_id).exists()


def test_a_file_shared_by_two_batches_stays_for_the_second(
    make_world: Callable[..., World],
) -> None:
    world = make_world(retention_input_s=60)
    file_id = upload(world)["id"]
    first, second = create(world, file_id), create(world, file_id)
    while world.validate():
        pass
    assert world.work() == first
    world.pass_time(DAY_S)
    world.keep_house()
    assert get(world, first)["status"] == "completed"
    assert file_status(world, file_id) == (200, 200)
    assert world.work() == second
    world.keep_house()
    assert file_status(world, file_id) == (404, 404)


def test_a_retry_does_not_need_what_it_was_made_of(make_world: Callable[..., World]) -> None:
    world = make_world(retention_input_s=60, retention_output_s=60)
    first = run(world, jsonl([line("long", "tiny-context", "word " * 9)]))
    again = body(world.client.post(f"/v1/batches/{first['id']}/retry"))
    world.pass_time(DAY_S)
    world.keep_house()
    assert file_status(world, first["input_file_id"]) == (404, 404)
    assert file_status(world, first["error_file_id"]) == (404, 404)
    assert file_status(world, again["input_file_id"]) == (200, 200)
    assert world.work() == again["id"]
    assert get(world, again["id"])["status"] == "completed"
    late = world.client.post(f"/v1/batches/{first['id']}/retry")
    assert (late.status_code, late.json()["error"]["code"]) == (404, "not_found")


def test_a_retry_whose_files_go_just_then_is_refused(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    batch = run(world, jsonl([line("long", "tiny-context", "word " * 9)]))

    def too_late(data: DataDir) -> IncomingFolder:
        data.input_file(batch["input_file_id"]).unlink()
        return IncomingFolder(data)

    monkeypatch.setattr("batch_app.retry.IncomingFolder", too_late)
    answer = world.client.post(f"/v1/batches/{batch['id']}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert list(world.data.incoming.iterdir()) == []


def test_parts_are_no_files_yet(make_world: Callable[..., World]) -> None:
    world = make_world(retention_input_s=60)
    wish = {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
    upload_id = body(world.client.post("/v1/uploads", json=wish))["id"]
    part = body(world.client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"abcd"}))
    world.pass_time(600)
    world.keep_house()
    end = {"part_ids": [part["id"]]}
    done = body(world.client.post(f"/v1/uploads/{upload_id}/complete", json=end))
    assert done["file"]["expires_at"] == done["file"]["created_at"] + 60
    world.pass_time(61)
    world.keep_house()
    assert file_status(world, done["file"]["id"]) == (404, 404)
    assert body(world.client.post(f"/v1/uploads/{upload_id}/complete", json=end))["file"] is None


def test_an_upload_that_is_not_completed_ends_with_its_hour(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    wish = {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
    begun = body(world.client.post("/v1/uploads", json=wish))
    assert begun["expires_at"] == begun["created_at"] + HOUR_S
    path = f"/v1/uploads/{begun['id']}"
    part = body(world.client.post(f"{path}/parts", files={"data": b"abcd"}))
    world.pass_time(HOUR_S)
    world.keep_house()
    assert body(world.client.get(path))["status"] == "pending"
    assert world.data.upload_dir(begun["id"]).exists()
    world.pass_time(1)
    world.keep_house()
    assert body(world.client.get(path))["status"] == "expired"
    assert not world.data.upload_dir(begun["id"]).exists()
    for answer in (
        world.client.post(f"{path}/complete", json={"part_ids": [part["id"]]}),
        world.client.post(f"{path}/parts", files={"data": b"abcd"}),
        world.client.post(f"{path}/cancel"),
    ):
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "upload_not_pending"
        assert answer.headers["x-should-retry"] == "false"


def test_logs_go_in_time_but_not_those_of_unfinished_batches(
    make_world: Callable[..., World],
) -> None:
    world = make_world(retention_log_s=7200)
    ended = run(world)["id"]
    waits = create(world, upload(world)["id"])
    world.pass_time(7200)
    world.keep_house()
    assert world.data.log_file(ended).exists()
    world.pass_time(1)
    world.keep_house()
    assert not world.data.log_file(ended).exists()
    assert world.data.log_file(waits).exists()
    assert world.client.get(f"/v1/batches/{ended}/logs").status_code == 200
