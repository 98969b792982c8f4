"""Servers and workers with a data folder each, and nothing between them but a database and an
object storage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import requests

from batch_app.core import BatchStatus
from batch_app.objects import Objects
from integration.api_fixtures import Api, input_file
from support.object_stores import S3Server
from support.postgres import PostgresServer
from support.site import ENDLESS, Site, assert_answers_echo, echo_line, kill_tree
from support.waiting import wait_for

SETTINGS: dict[str, Any] = {
    "lease_s": 5.0,
    "heartbeat_s": 0.3,
    "poll_interval_s": 0.5,
    "commit_interval_s": 0.05,
    "storage_copy_interval_s": 0.1,
}


def submitted(url: str, num_requests: int, model: str) -> str:
    content = b"".join(orjson.dumps(echo_line(n)) + b"\n" for n in range(num_requests))
    answer = httpx.post(
        f"{url}/v1/batches",
        files={"file": ("in.jsonl", content)},
        data={"model": model},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    batch_id = answer.json()["batch_id"]
    assert isinstance(batch_id, str)
    return batch_id


def results_at(url: str, batch_id: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/v1/batches/{batch_id}/results", timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-results-complete"] == "true"
    return [orjson.loads(line) for line in answer.content.splitlines()]


@dataclass
class Sites:
    a: Site
    b: Site
    objects: Objects


@pytest.fixture
def sites(postgres: PostgresServer, s3_environment: S3Server, tmp_path: Path) -> Iterator[Sites]:
    settings = {
        **SETTINGS,
        "database_url": postgres.new_database_with_tables(),
        "storage_url": s3_environment.new_bucket(),
    }
    both = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        both.append(Site(tmp_path / name, **settings))
    yield Sites(*both, Objects(settings["storage_url"]))
    for site in both:
        site.close()


@pytest.mark.long
def test_a_batch_outlives_the_machine_that_ran_it(sites: Sites) -> None:
    a, b = sites.a, sites.b
    url_a = a.start_server()
    batch_id = submitted(url_a, 300, "held")
    b.hold.touch()
    worker = b.start_worker()
    b.wait_for_progress(batch_id, 100)

    def copied() -> int:
        return sum(found.size_bytes for found in sites.objects.list(f"results/{batch_id}"))

    folder = b.data.work_dir(batch_id)
    wait_for(
        lambda: copied() == sum(path.stat().st_size for path in folder.glob("results-*.log")),
        what="all results are copied",
    )
    so_far = httpx.get(f"{url_a}/v1/batches/{batch_id}/results", timeout=120)
    assert so_far.headers["x-results-complete"] == "false"
    assert len(so_far.content.splitlines()) >= 100

    kill_tree(worker.pid)
    shutil.rmtree(b.data.root)
    a.start_worker()
    batch = a.wait_until_done(batch_id)
    assert (batch.status, batch.epoch) == (BatchStatus.COMPLETED, 2)
    assert "Going on: 1" in a.log(batch_id)

    assert_answers_echo(results_at(url_a, batch_id), 300)
    b.data.create()
    url_b = b.start_server()
    assert_answers_echo(results_at(url_b, batch_id), 300)
    assert not b.data.results_file(batch).exists()  # it came straight from the store
    log = httpx.get(f"{url_b}/v1/batches/{batch_id}/logs", timeout=120).text.splitlines()
    assert log == sorted(log, key=lambda line: line[:20])
    for said in ("submitted", "(claim 1)", "(claim 2)"):
        assert any(said in line for line in log), said
    wait_for(
        lambda: not list(sites.objects.list(f"results/{batch_id}")),
        what="the copies of the results are removed",
    )
    assert not list(sites.objects.list(f"index/{batch_id}.tar"))


def test_a_store_that_is_away_holds_a_batch_up_and_nothing_is_lost(
    sites: Sites, s3_environment: S3Server
) -> None:
    site = sites.a
    url = site.start_server()
    site.hold.touch()
    batch_id = submitted(url, 300, "held")
    site.start_worker()
    site.wait_for_progress(batch_id, 100)
    s3_environment.fail(True)
    try:
        answer = httpx.post(
            f"{url}/v1/batches",
            files={"file": ("in.jsonl", orjson.dumps(echo_line(0)) + b"\n")},
            data={"model": "sim"},
            timeout=120,
        )
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "object_storage_unavailable"
        ready = httpx.get(f"{url}/readyz", timeout=120)
        assert ready.status_code == 503
        assert ready.json()["checks"]["object_storage"] != "ok"
        site.hold.unlink()
        wait_for(
            lambda: "object storage" in (site.batch(batch_id).pause_reason or ""),
            what="the batch says why it waits",
        )
        assert site.batch(batch_id).progress.done == 300
        assert "Waiting for the object storage" in site.log(batch_id)
    finally:
        s3_environment.fail(False)
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert_answers_echo(results_at(url, batch_id), 300)
    assert len(site.store.list_batches(limit=10)[0]) == 1  # nothing of the one refused
    listed = httpx.get(f"{url}/v1/files", timeout=120).json()["data"]
    assert len([file for file in listed if file["purpose"] == "batch"]) == 1


@pytest.mark.long
def test_a_batch_is_cancelled_where_its_worker_is_not(sites: Sites) -> None:
    """Its machine is gone: a server elsewhere publishes what was copied."""
    a, b = sites.a, sites.b
    url = a.start_server()
    batch_id = submitted(url, ENDLESS, "held")
    b.hold.touch()
    worker = b.start_worker()
    b.wait_for_progress(batch_id, 100)
    folder = f"results/{batch_id}"
    wait_for(lambda: sum(one.size_bytes for one in sites.objects.list(folder)) > 20_000)
    kill_tree(worker.pid)
    answer = httpx.post(f"{url}/v1/batches/{batch_id}/cancel", timeout=120)
    assert answer.status_code == 200
    batch = a.wait_until_done(batch_id)
    assert batch.status is BatchStatus.CANCELLED
    assert batch.progress.completed > 0
    lines = results_at(url, batch_id)
    assert len(lines) == ENDLESS
    assert sum(line["response"] is not None for line in lines) == batch.progress.completed


# -- two servers, in this process ------------------------------------------------------------------


@pytest.fixture
def two(start_api: Callable[..., Api], storage_url: str, tmp_path: Path) -> tuple[Api, Api]:
    shared = {"database_url": f"sqlite:///{tmp_path / 'shared.db'}", "storage_url": storage_url}
    return (
        start_api(data_dir=tmp_path / "a", **shared),
        start_api(data_dir=tmp_path / "b", **shared),
    )


def uploaded(api: Api, content: bytes) -> str:
    answer = api.call(
        "POST",
        "/v1/files",
        files={"file": ("in.jsonl", content)},
        data={"purpose": "batch"},
    )
    assert answer.status_code == 200, answer.text
    file_id = answer.json()["id"]
    assert isinstance(file_id, str)
    return file_id


def test_a_file_is_the_same_at_both_servers(two: tuple[Api, Api]) -> None:
    content = input_file(50)
    file_id = uploaded(two[0], content)
    path = f"/v1/files/{file_id}/content"
    answers = [api.get(path) for api in two]
    assert [answer.content for answer in answers] == [content, content]
    assert answers[0].headers["etag"] == answers[1].headers["etag"]
    assert answers[0].headers["last-modified"] == answers[1].headers["last-modified"]
    plain = {"accept-encoding": "identity"}
    etag = two[1].get(path, headers=plain).headers["etag"]
    assert etag == two[0].get(path, headers=plain).headers["etag"]
    for header, status, body in [
        ({"range": "bytes=10-19"}, 206, content[10:20]),
        ({"range": "bytes=-5"}, 206, content[-5:]),
        ({"range": f"bytes={len(content) - 3}-"}, 206, content[-3:]),
        ({"range": "bytes=5-9", "if-range": etag}, 206, content[5:10]),
        ({"range": "bytes=5-9", "if-range": '"other"'}, 200, content),
        ({"range": "lines=5-9"}, 200, content),
        ({"range": "bytes=9-5"}, 200, content),
        ({"if-none-match": etag}, 304, b""),
    ]:
        for api in two:
            answer = api.get(path, headers={**plain, **header})
            assert (answer.status_code, answer.content) == (status, body), header
    for api in two:
        beyond = api.get(path, headers={"range": f"bytes={len(content)}-"})
        assert beyond.status_code == 416
        assert beyond.headers["content-range"] == f"bytes */{len(content)}"
        head = api.call("HEAD", path, headers=plain)
        assert head.headers["content-length"] == str(len(content))
        zipped = api.get(path, headers={"accept-encoding": "gzip"})
        assert "content-encoding" not in zipped.headers
        assert zipped.headers["content-length"] == str(len(content))
        assert zipped.headers["etag"] == etag
    assert not two[1].data.input_file(file_id).exists()


def test_a_deleted_file_is_gone_everywhere(two: tuple[Api, Api]) -> None:
    file_id = uploaded(two[0], input_file(2))
    objects = two[0].data.objects
    assert objects is not None
    assert objects.size(f"input/{file_id}.jsonl")
    assert two[1].call("DELETE", f"/v1/files/{file_id}").status_code == 200
    with pytest.raises(FileNotFoundError):
        objects.size(f"input/{file_id}.jsonl")
    for api in two:
        assert api.get(f"/v1/files/{file_id}/content").status_code == 404


def test_parts_may_arrive_at_either_server(two: tuple[Api, Api]) -> None:
    content = input_file(10)
    half = len(content) // 2
    made = two[0].call(
        "POST",
        "/v1/uploads",
        json={
            "filename": "in.jsonl",
            "purpose": "batch",
            "bytes": len(content),
            "mime_type": "application/jsonl",
        },
    )
    upload_id = made.json()["id"]
    part_ids = []
    for api, part in zip(two, (content[:half], content[half:]), strict=True):
        answer = api.call("POST", f"/v1/uploads/{upload_id}/parts", files={"data": ("part", part)})
        assert answer.status_code == 200, answer.text
        part_ids.append(answer.json()["id"])
    done = two[1].call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids})
    assert done.status_code == 200, done.text
    file_id = done.json()["file"]["id"]
    assert two[0].get(f"/v1/files/{file_id}/content").content == content
    objects = two[0].data.objects
    assert objects is not None
    assert list(objects.list("uploads")) == []


def test_a_batch_is_checked_where_its_file_is_not(two: tuple[Api, Api]) -> None:
    file_id = uploaded(two[0], input_file(3))
    two[0].data.input_file(file_id).unlink()  # whichever of the two checks it
    answer = two[1].call(
        "POST",
        "/v1/batches",
        json={
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    )
    assert answer.status_code == 200, answer.text
    batch_id = answer.json()["id"]
    wait_for(
        lambda: two[0].batch(batch_id).status not in (BatchStatus.VALIDATING,),
        what="its lines are checked",
    )
    assert two[0].batch(batch_id).queued_at is None  # it names no model of this registry
    assert two[0].batch(batch_id).errors


def test_links_to_the_store(two: tuple[Api, Api], storage_url: str) -> None:
    content = input_file(5)
    file_id = uploaded(two[0], content)
    for api in two:
        path = f"/v1/files/{file_id}/content"
        told = api.get(path, params={"link": "json"})
        sent = requests.get(
            f"{api.url}{path}", params={"link": "redirect"}, allow_redirects=False, timeout=120
        )
        if storage_url.startswith("file:"):
            assert told.status_code == 409
            assert told.json()["error"]["code"] == "no_download_links"
            assert (sent.status_code, sent.content) == (200, content)
            continue
        assert told.status_code == 200, told.text
        assert sent.status_code == 307
        for url in (told.json()["url"], sent.headers["location"]):
            assert requests.get(url, timeout=120).content == content
        assert told.headers["cache-control"] == sent.headers["cache-control"] == "no-store"
    missing = two[0].get(f"/v1/files/file-{'0' * 24}/content", params={"link": "json"})
    assert missing.status_code == 404
    assert two[0].get(path, params={"link": "please"}).status_code == 400
