"""Cancelling, results and logs, with the worker's part played by the test."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime

import pytest
import requests

from batch_app.batch_log import BatchLog
from batch_app.core import Batch, BatchStatus, Progress, TokenCounts
from batch_app.results import ResultsLog
from integration.api_fixtures import Api
from support.waiting import wait_for


def output_line(custom_id: str, status_code: int = 200) -> bytes:
    return json.dumps(
        {
            "id": f"batch_req_{custom_id}",
            "custom_id": custom_id,
            "response": {"status_code": status_code, "request_id": "r", "body": {}},
            "error": None,
        }
    ).encode()


def claim(api: Api) -> Batch:
    batch = api.store.claim_next("worker", 300, datetime.now(UTC))
    assert batch is not None
    return batch


def complete(api: Api, batch: Batch, lines: list[bytes]) -> None:
    now = datetime.now(UTC)
    api.data.results_file(batch).write_bytes(b"".join(line + b"\n" for line in lines))
    finalizing = api.store.transition(batch, BatchStatus.FINALIZING, now)
    api.store.transition(
        finalizing, BatchStatus.COMPLETED, now, progress=Progress(len(lines), 0, TokenCounts())
    )


def test_delete_cancels_a_pending_batch(api: Api) -> None:
    batch_id = api.submitted()

    answer = api.call("DELETE", f"/v1/batches/{batch_id}")

    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert answer.json()["completed_at"] is not None
    assert not api.data.work_dir(batch_id).exists()
    assert "cancelled" in api.get(f"/v1/batches/{batch_id}/logs").text
    assert api.store.claim_next("worker", 30, datetime.now(UTC)) is None
    again = api.call("DELETE", f"/v1/batches/{batch_id}")
    assert again.status_code == 409
    assert again.headers["x-should-retry"] == "false"
    results = api.get(f"/v1/batches/{batch_id}/results")
    assert results.status_code == 404
    assert "cancelled" in results.json()["error"]["message"]


def test_delete_leaves_a_running_batch_alone(api: Api) -> None:
    batch_id = api.submitted()
    claim(api)

    answer = api.call("DELETE", f"/v1/batches/{batch_id}")

    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert f"POST /v1/batches/{batch_id}/cancel" in answer.json()["error"]["message"]
    assert api.batch(batch_id).status is BatchStatus.RUNNING


def test_cancel_asks_the_worker_to_stop(api: Api) -> None:
    batch_id = api.submitted()
    claim(api)

    for _ in range(2):  # twice is harmless
        answer = api.call("POST", f"/v1/batches/{batch_id}/cancel")
        assert answer.status_code == 200
        assert answer.json()["status"] == "running"
    assert api.batch(batch_id).status is BatchStatus.CANCELLING


def test_cancel_of_a_finished_batch_is_refused(api: Api) -> None:
    batch_id = api.submitted(1)
    complete(api, claim(api), [output_line("req-0")])

    answer = api.call("POST", f"/v1/batches/{batch_id}/cancel")

    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert "completed" in answer.json()["error"]["message"]


def test_results_of_a_finished_batch(api: Api) -> None:
    batch_id = api.submitted(3)
    lines = [output_line("req-0"), output_line("req-1", 400), output_line("req-2")]
    complete(api, claim(api), lines)
    path = f"/v1/batches/{batch_id}/results"
    whole = b"".join(line + b"\n" for line in lines)

    answer = api.get(path)
    assert answer.content == whole
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["x-results-complete"] == "true"
    assert answer.headers["content-disposition"].startswith("attachment;")
    part = api.get(path, headers={"range": "bytes=10-29"})
    assert part.status_code == 206
    assert part.content == whole[10:30]
    assert api.get(f"{path}?status=failed").content == lines[1] + b"\n"
    assert api.get(f"{path}?status=completed").content == lines[0] + b"\n" + lines[2] + b"\n"
    wrong = api.get(f"{path}?status=odd")
    assert wrong.status_code == 400
    assert "failed" in wrong.json()["error"]["message"]


def test_results_so_far(api: Api) -> None:
    batch_id = api.submitted(3)
    path = f"/v1/batches/{batch_id}/results"
    pending = api.get(path)
    assert pending.status_code == 409
    assert "pending" in pending.json()["error"]["message"]
    batch = claim(api)
    assert api.get(path).content == b""

    log = ResultsLog(api.data.work_dir(batch_id), 3, batch.epoch)
    log.append(1, 200, TokenCounts(1, 1), output_line("req-1"))
    log.append(0, 400, TokenCounts(), output_line("req-0", 400))
    log.commit()

    answer = api.get(path)
    assert answer.headers["x-results-complete"] == "false"
    assert answer.content == output_line("req-1") + b"\n" + output_line("req-0", 400) + b"\n"
    assert api.get(f"{path}?status=failed").content == output_line("req-0", 400) + b"\n"
    log.close()


def test_logs(api: Api) -> None:
    batch_id = api.submitted()
    path = f"/v1/batches/{batch_id}/logs"
    log = BatchLog(api.data.log_file(batch_id))
    log.write("hostile \x1b[2J\n2026-01-01 00:00:00Z  forged \u202e line")
    for number in range(5):
        log.write(f"line {number}")

    answer = api.get(path)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    lines = answer.text.splitlines()
    assert len(lines) == 7
    assert "submitted: 3 requests" in lines[0]
    assert "\\x1b[2J\\x0a" in lines[1]
    assert api.get(f"{path}?tail=2").text == "\n".join(lines[-2:]) + "\n"
    assert api.get(f"{path}?tail=0").text == ""
    assert api.get(f"{path}?tail=99").text == answer.text
    assert api.get(f"{path}?tail=-1").status_code == 400
    assert api.get(f"{path}?tail=x").status_code == 400


def test_log_that_is_followed_ends_with_the_batch(api: Api) -> None:
    batch_id = api.submitted(1)
    batch = claim(api)
    log = BatchLog(api.data.log_file(batch_id))
    received: list[bytes] = []

    def follow() -> None:
        url = f"{api.url}/v1/batches/{batch_id}/logs?follow=true&tail=0"
        with requests.get(url, stream=True, timeout=120) as response:
            received.extend(response.iter_content(None))

    reader = threading.Thread(target=follow)
    reader.start()
    # tail=0 leaves out what was there when the call arrived: write until something comes.
    wait_for(lambda: log.write("first") or received, what="a followed line")
    complete(api, batch, [output_line("req-0")])
    log.write("last")
    reader.join(timeout=120)

    assert not reader.is_alive()
    assert b"".join(received).endswith(b"  last\n") or b"first" in b"".join(received)


@pytest.mark.parametrize(
    "batch_id",
    [
        "batch_000000000000000000000000",
        "batch_00000000000000000000000G",
        "batch_1",
        "..%2f..%2fetc%2fpasswd",
        "x" * 3000,
    ],
)
@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/cancel"),
        ("GET", "/results"),
        ("GET", "/logs"),
    ],
)
def test_unknown_ids(api: Api, batch_id: str, method: str, rest: str) -> None:
    answer = api.call(method, f"/v1/batches/{batch_id}{rest}")

    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
