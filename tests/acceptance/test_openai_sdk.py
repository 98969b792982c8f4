"""Batches through the OpenAI SDK, against a real server and worker."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import openai
import pytest
from openai.types import Batch

from acceptance.conftest import Running
from batch_app import database
from support.sdk import Sdk, assert_each_once, ids, line, lines
from support.waiting import wait_for

STAMPS = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


def stamped(batch: Batch) -> list[str]:
    return [name for name in STAMPS if getattr(batch, name) is not None]


def assert_counts(batch: Batch, total: int, completed: int, failed: int) -> None:
    counts = batch.request_counts
    assert counts
    assert (counts.total, counts.completed, counts.failed) == (total, completed, failed)


def busy_worker(sdk: Sdk) -> Batch:
    """A batch that the worker has begun, and has enough to do with: others wait behind it."""
    batch = sdk.create(lines(10_000, "slow"))
    wait_for(lambda: native(sdk, batch.id)["status"] == "running", what="the worker begins")
    return batch


# -- a good life -----------------------------------------------------------------------------------


def test_a_batch_from_upload_to_download(sdk: Sdk) -> None:
    before = int(time.time())
    requests = lines(20, max_tokens=2)
    batch = sdk.create(requests, metadata={"customer": "ü" * 512, "run": "7"})

    assert batch.id.startswith("batch_")
    assert (batch.object, batch.status) == ("batch", "validating")
    assert (batch.endpoint, batch.completion_window) == ("/v1/chat/completions", "24h")
    assert batch.expires_at == batch.created_at + 86400
    assert batch.metadata == {"customer": "ü" * 512, "run": "7"}
    assert (batch.output_file_id, batch.error_file_id, batch.errors) == (None, None, None)
    assert stamped(batch) == []
    assert batch.usage is None
    assert_counts(batch, 0, 0, 0)

    done = sdk.wait(batch)
    assert done.status == "completed"
    assert stamped(done) == ["in_progress_at", "finalizing_at", "completed_at"]
    times = [batch.created_at, *(getattr(done, name) for name in stamped(done))]
    assert before <= times[0]
    assert times == sorted(times)
    assert times[-1] <= time.time()
    for unchanged in ("id", "created_at", "expires_at", "input_file_id", "metadata", "endpoint"):
        assert getattr(done, unchanged) == getattr(batch, unchanged)
    assert done.model == "sim"
    assert_counts(done, 20, 20, 0)
    assert (done.errors, done.error_file_id) == (None, None)
    usage = done.usage
    assert usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (40, 40, 80)
    assert usage.input_tokens_details.cached_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0

    assert done.output_file_id
    file = sdk.client.files.retrieve(done.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{done.id}_output.jsonl")
    raw = sdk.client.files.content(done.output_file_id).content
    assert len(raw) == file.bytes
    results = [json.loads(result) for result in raw.splitlines()]
    assert ids(results) == [f"r{number}" for number in range(20)]
    for result in results:
        assert set(result) == {"id", "custom_id", "response", "error"}
        assert result["id"].startswith("batch_req_")
        assert result["error"] is None
        response = result["response"]
        assert (response["status_code"], set(response)) == (
            200,
            {"status_code", "request_id", "body"},
        )
        said = response["body"]["choices"][0]["message"]["content"]
        assert said == f"say {result['custom_id']}"
    assert len({result["id"] for result in results}) == 20


@pytest.mark.parametrize(
    ("window", "seconds"), [("24h", 86400), ("1h", 3600), ("7d", 604800), ("90m", 5400)]
)
def test_windows_of_any_length_are_kept(idle_sdk: Sdk, window: str, seconds: int) -> None:
    batch = idle_sdk.create(lines(1), completion_window=window)
    assert batch.completion_window == window
    assert batch.expires_at == batch.created_at + seconds


@pytest.mark.parametrize("window", ["", "24", "h", "0h", "-1h", "1w", "367d", "٣h", "1.5h"])
def test_a_window_that_means_nothing_is_refused(idle_sdk: Sdk, window: str) -> None:
    file_id = idle_sdk.upload(lines(1))
    with pytest.raises(openai.BadRequestError) as refusal:
        idle_sdk.create_from(file_id, completion_window=window)
    assert refusal.value.param == "completion_window"


def test_published_files_may_be_given_an_end(sdk: Sdk) -> None:
    requests = [*lines(3, "tiny-context"), line("long", "tiny-context", "word " * 9)]
    batch = sdk.run(requests, output_expires_after={"anchor": "created_at", "seconds": 3600})
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id
        file = sdk.client.files.retrieve(file_id)
        assert file.expires_at == file.created_at + 3600
    assert sdk.client.files.retrieve(batch.input_file_id).expires_at is None


def test_expired_files_are_removed_in_time(sdk: Sdk, working: Running) -> None:
    batch = sdk.run(lines(2), output_expires_after={"anchor": "created_at", "seconds": 3600})
    assert batch.output_file_id
    path = working.site.data.output_file(batch.output_file_id)
    assert path.exists()
    set_row(working, "files", batch.output_file_id, expires_at=datetime.now(UTC))
    wait_for(lambda: not path.exists(), what="the bytes are gone")
    with pytest.raises(openai.NotFoundError):
        sdk.client.files.content(batch.output_file_id)
    assert sdk.get(f"/v1/batches/{batch.id}/results").status_code == 404


def test_an_expired_input_stays_while_a_batch_needs_it(idle_sdk: Sdk, waiting: Running) -> None:
    batch = idle_sdk.create(lines(2))
    lonely = idle_sdk.upload(lines(2))
    idle_sdk.wait(batch, "in_progress")
    for file_id in (batch.input_file_id, lonely):
        set_row(waiting, "files", file_id, expires_at=datetime.now(UTC))
    path = waiting.site.data.input_file(batch.input_file_id)
    wait_for(lambda: not waiting.site.data.input_file(lonely).exists(), what="the other goes")
    assert path.exists()
    idle_sdk.client.batches.cancel(batch.id)
    wait_for(lambda: not path.exists(), what="gone with its batch")


def test_requests_that_fail_stand_in_the_error_file(sdk: Sdk) -> None:
    requests = lines(5, "tiny-context")
    requests[3] = line("long", "tiny-context", "word " * 9)
    batch = sdk.run(requests)
    assert batch.status == "completed"
    assert_counts(batch, 5, 4, 1)
    output, errors = sdk.outcomes(batch)
    assert ids(output) == ["r0", "r1", "r2", "r4"]
    assert ids(errors) == ["long"]
    assert errors[0]["error"] is None
    assert errors[0]["response"]["status_code"] == 400
    error = errors[0]["response"]["body"]["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert "context length" in error["message"]


def test_a_batch_whose_requests_all_fail_is_completed(sdk: Sdk) -> None:
    batch = sdk.run([line(f"r{n}", "tiny-context", "word " * 9) for n in range(3)])
    assert batch.status == "completed"
    assert batch.output_file_id is None
    assert_counts(batch, 3, 0, 3)
    assert_each_once(sdk, batch, ["r0", "r1", "r2"])


def test_a_model_that_does_not_load_fails_its_batch_and_says_so(sdk: Sdk) -> None:
    batch = sdk.run(lines(2, "unloadable"))
    assert batch.status == "failed"
    assert stamped(batch) == ["in_progress_at", "failed_at"]
    assert batch.errors
    assert batch.errors.data
    assert [(error.code, error.line) for error in batch.errors.data] == [("batch_failed", None)]
    assert batch.errors.data[0].message == "No such weights."
    assert_each_once(sdk, batch, ["r0", "r1"])


def test_several_models_in_one_file_run_group_by_group(sdk: Sdk, working: Running) -> None:
    requests = [line(f"r{n}", "sim" if n % 2 else "tiny-context") for n in range(12)]
    batch = sdk.run(requests)
    assert batch.status == "completed"
    output, _ = sdk.outcomes(batch)
    assert ids(output) == [f"r{n}" for n in range(12)]
    models = [result["response"]["body"]["model"] for result in output]
    assert models == ["tiny-context", "sim"] * 6
    assert working.site.log(batch.id).count("Loading") <= 2


def test_a_higher_priority_goes_first(sdk: Sdk) -> None:
    blocker = busy_worker(sdk)
    low, high = (sdk.create(lines(1), extra_body={"priority": level}) for level in (0, 5))
    for batch in (low, high):
        sdk.wait(batch, "in_progress")
    sdk.client.batches.cancel(blocker.id)
    started = [native(sdk, sdk.wait(batch).id)["started_at"] for batch in (high, low)]
    assert started == sorted(started)
    assert sdk.client.batches.retrieve(high.id).model_extra
    assert sdk.get(f"/v1/batches/{high.id}").json()["priority"] == 5


# -- the lines are checked in the background -------------------------------------------------------


def test_creating_does_not_wait_for_the_check(idle_sdk: Sdk, record_property: Any) -> None:
    file_id = idle_sdk.upload(lines(50_000))
    started = time.monotonic()
    batch = idle_sdk.create_from(file_id)
    took_s = time.monotonic() - started
    record_property("create_answered_in_s", f"{took_s:.3f}")
    assert batch.status == "validating"
    assert_counts(batch, 0, 0, 0)
    assert took_s < 5, "generous: it takes milliseconds on a machine that has nothing else to do"
    checked = idle_sdk.wait(batch, "in_progress")
    assert_counts(checked, 50_000, 0, 0)
    idle_sdk.client.batches.cancel(batch.id)
    idle_sdk.wait(batch)


def bad(custom_id: str, /, **changes: Any) -> dict[str, Any]:
    kept = (line(custom_id) | changes).items()
    return {name: value for name, value in kept if value is not ...}


#: What is wrong, the file, and the errors as (code, line, param).
BAD_FILES: dict[str, tuple[Any, list[tuple[str, int | None, str | None]]]] = {
    "empty": (b"", [("empty_file", None, None)]),
    "blank": (b"\n \r\n\n", [("empty_batch", None, None)]),
    "duplicate": (
        [line("a"), line("b"), line("a")],
        [("duplicate_custom_id", 3, "custom_id")],
    ),
    "no JSON": (
        json.dumps(line("a")).encode() + b"\n{not json}\n\n[1]\n",
        [("invalid_json_line", 2, None), ("invalid_json_line", 4, None)],
    ),
    "other url": ([bad("a", url="/v1/completions")], [("url_mismatch", 1, "url")]),
    "unknown url": ([bad("a", url="/v1/audio")], [("url_mismatch", 1, "url")]),
    "method": ([bad("a", method="GET")], [("invalid_method", 1, "method")]),
    "model": ([line("a", "gpt-4o")], [("model_not_found", 1, "body.model")]),
    "no model": (
        [bad("a", body={"messages": [{"role": "user", "content": "x"}]})],
        [("missing_required_parameter", 1, "body.model")],
    ),
    "no id": ([bad("a", custom_id=...)], [("missing_required_parameter", 1, "custom_id")]),
    "no messages": (
        [bad("a", body={"model": "sim"})],
        [("missing_required_parameter", 1, "body.messages")],
    ),
    "no body": ([bad("a", body=...)], [("missing_required_parameter", 1, "body")]),
    "long id": ([bad("x" * 513)], [("invalid_request", 1, "custom_id")]),
    "stream": ([line("a", stream=True)], [("invalid_request", 1, "body.stream")]),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_lines_fail_the_batch(idle_sdk: Sdk, what: str) -> None:
    content, found = BAD_FILES[what]
    batch = idle_sdk.run(content)
    assert batch.status == "failed"
    assert stamped(batch) == ["failed_at"]
    assert batch.errors
    assert batch.errors.object == "list"
    assert batch.errors.data
    assert [(error.code, error.line, error.param) for error in batch.errors.data] == found
    assert all(error.message for error in batch.errors.data)
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert_counts(batch, 0, 0, 0)
    assert idle_sdk.client.files.delete(batch.input_file_id).deleted


# -- ending early ----------------------------------------------------------------------------------


def test_cancelling_a_running_batch_keeps_what_is_done(sdk: Sdk) -> None:
    batch = sdk.create(lines(5000, "slow"))

    def some_are_done() -> bool:
        counts = sdk.client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed >= 50

    wait_for(some_are_done, what="50 results")
    asked_at = time.monotonic()
    answer = sdk.client.batches.cancel(batch.id)
    assert answer.status == "cancelling"
    assert stamped(answer) == ["in_progress_at", "cancelling_at"]
    done = sdk.wait(batch, timeout_s=10)
    assert time.monotonic() - asked_at < 10
    assert done.status == "cancelled"
    assert stamped(done) == ["in_progress_at", "cancelling_at", "cancelled_at"]
    assert done.request_counts
    assert done.request_counts.completed >= 50
    assert_each_once(sdk, done, [f"r{number}" for number in range(5000)])
    output, errors = sdk.outcomes(done)
    assert len(output) == done.request_counts.completed
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}
    assert {error["response"] for error in errors} == {None}
    # Doing it twice is harmless.
    assert sdk.client.batches.cancel(batch.id).status == "cancelled"


def test_cancelling_a_queued_batch_needs_no_worker(idle_sdk: Sdk, waiting: Running) -> None:
    batch = idle_sdk.create(lines(100))
    idle_sdk.wait(batch, "in_progress")
    assert idle_sdk.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = idle_sdk.wait(batch, timeout_s=10)
    assert done.status == "cancelled"
    assert_counts(done, 100, 0, 0)
    assert done.output_file_id is None
    assert_each_once(idle_sdk, done, [f"r{number}" for number in range(100)])
    assert {error["error"]["code"] for error in idle_sdk.outcomes(done)[1]} == {"batch_cancelled"}
    wait_for(lambda: not waiting.site.data.work_dir(batch.id).exists(), what="nothing is left")


def test_cancelling_during_the_check_ends_it(idle_sdk: Sdk, waiting: Running) -> None:
    file_id = idle_sdk.upload(lines(50_000))
    batch = idle_sdk.create_from(file_id)
    answer = idle_sdk.client.batches.cancel(batch.id)
    assert answer.status in ("cancelling", "cancelled")
    done = idle_sdk.wait(batch, timeout_s=10)
    assert done.status == "cancelled"
    assert done.cancelling_at
    wait_for(
        lambda: (
            not any(waiting.site.data.incoming.iterdir())
            and not waiting.site.data.work_dir(batch.id).exists()
        ),
        what="nothing is left of the check",
    )


def test_cancelling_a_finished_batch_is_refused_once(sdk: Sdk) -> None:
    batch = sdk.run(lines(1))
    sent = len(sdk.sent)
    with pytest.raises(openai.ConflictError) as refusal:
        sdk.client.batches.cancel(batch.id)
    assert refusal.value.code == "batch_not_cancellable"
    assert len(sdk.sent) == sent + 1, "the SDK repeated what can't succeed"
    assert sdk.client.batches.retrieve(batch.id) == batch


def test_a_running_batch_expires_and_keeps_what_is_done(sdk: Sdk, working: Running) -> None:
    blocker = busy_worker(sdk)
    batch = sdk.create(lines(5000, "slow"), completion_window="1h")
    sdk.wait(batch, "in_progress")
    # The window ends in a moment, but begins to run for this batch now.
    set_row(working, "batches", batch.id, expires_at=datetime.now(UTC) + timedelta(seconds=6))
    sdk.client.batches.cancel(blocker.id)
    done = sdk.wait(batch)
    assert done.status == "expired"
    assert stamped(done) == ["in_progress_at", "expired_at"]
    assert done.request_counts
    assert 0 < done.request_counts.completed < 5000
    assert_each_once(sdk, done, [f"r{number}" for number in range(5000)])
    output, errors = sdk.outcomes(done)
    assert len(output) == done.request_counts.completed
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}


def test_a_queued_batch_expires_without_a_worker(idle_sdk: Sdk, waiting: Running) -> None:
    batch = idle_sdk.create(lines(10), completion_window="1h")
    idle_sdk.wait(batch, "in_progress")
    set_row(waiting, "batches", batch.id, expires_at=datetime.now(UTC))
    done = idle_sdk.wait(batch, timeout_s=10)
    assert done.status == "expired"
    assert_each_once(idle_sdk, done, [f"r{number}" for number in range(10)])


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_batch_whose_worker_is_gone_ends_without_one(
    idle_sdk: Sdk, waiting: Running, ending: str
) -> None:
    batch = idle_sdk.create(lines(400, "slow"))
    idle_sdk.wait(batch, "in_progress")
    worker = waiting.site.start_worker()
    waiting.site.wait_for_progress(batch.id, 30)
    worker.kill()
    worker.wait(timeout=10)
    if ending == "cancelled":
        idle_sdk.client.batches.cancel(batch.id)
    else:
        set_row(waiting, "batches", batch.id, expires_at=datetime.now(UTC))
    done = idle_sdk.wait(batch, timeout_s=20)  # its lease has to run out first
    assert done.status == ending
    assert done.request_counts
    assert done.request_counts.completed >= 30
    assert_each_once(idle_sdk, done, [f"r{number}" for number in range(400)])
    assert len(idle_sdk.outcomes(done)[0]) == done.request_counts.completed


# -- running it again ------------------------------------------------------------------------------


def retry(sdk: Sdk, batch: Batch) -> Batch:
    return sdk.client.post(f"/batches/{batch.id}/retry", cast_to=Batch)


def test_only_what_failed_runs_again(sdk: Sdk) -> None:
    requests = lines(6, "tiny-context")
    for number in (1, 4):
        requests[number] = line(f"r{number}", "tiny-context", "word " * 9)
    first = sdk.run(requests, metadata={"run": "1"}, completion_window="7d")

    again = retry(sdk, first)
    assert again.id != first.id
    assert (again.metadata, again.completion_window) == ({"run": "1"}, "7d")
    assert again.model_extra
    assert again.model_extra["retry_of"] == first.id
    done = sdk.wait(again)
    assert_counts(done, 2, 0, 2)
    assert_each_once(sdk, done, ["r1", "r4"])
    assert sdk.client.batches.retrieve(first.id) == first


def test_a_cancelled_batch_goes_on_as_a_retry(sdk: Sdk) -> None:
    blocker = busy_worker(sdk)
    batch = sdk.create(lines(5))
    sdk.wait(batch, "in_progress")
    sdk.client.batches.cancel(batch.id)
    sdk.wait(batch)
    again = retry(sdk, batch)
    sdk.client.batches.cancel(blocker.id)
    done = sdk.wait(again)
    assert_counts(done, 5, 5, 0)
    with pytest.raises(openai.ConflictError) as refusal:
        retry(sdk, done)
    assert refusal.value.code == "nothing_to_retry"


def test_blank_lines_do_not_confuse_the_retry(sdk: Sdk) -> None:
    requests = [line("a", "tiny-context", "word " * 9), line("b", "tiny-context")]
    rows = [json.dumps(request).encode() for request in requests]
    batch = sdk.run(b"\xef\xbb\xbf" + rows[0] + b"\r\n\n \t\n\x0b\x0c\r\n" + rows[1])
    assert_counts(batch, 2, 1, 1)
    done = sdk.wait(retry(sdk, batch))
    assert_each_once(sdk, done, ["a"])


def test_what_can_not_be_run_again_says_why(sdk: Sdk) -> None:
    refused = sdk.run(b"")
    with pytest.raises(openai.ConflictError) as refusal:
        retry(sdk, refused)
    assert refusal.value.code == "nothing_to_retry"
    running = sdk.wait(sdk.create(lines(2000, "slow")), "in_progress")
    with pytest.raises(openai.ConflictError) as refusal:
        retry(sdk, running)
    assert refusal.value.code == "batch_not_finished"
    sdk.client.batches.cancel(running.id)
    gone = sdk.wait(running)
    sdk.client.files.delete(gone.input_file_id)
    with pytest.raises(openai.NotFoundError):
        retry(sdk, gone)


# -- lists -----------------------------------------------------------------------------------------


def test_250_batches_are_listed_page_by_page(idle_sdk: Sdk) -> None:
    file_id = idle_sdk.upload(b"")  # whose batches fail at once
    made = [idle_sdk.create_from(file_id).id for _ in range(250)]
    sent = len(idle_sdk.sent)
    for limit, pages in ((100, 3), (20, 13)):
        listed = []
        for batch in idle_sdk.client.batches.list(limit=limit):
            listed.append(batch.id)
            if len(listed) == 250:
                break
        assert listed == made[::-1]
        assert len(idle_sdk.sent) == sent + pages
        sent = len(idle_sdk.sent)
    page = idle_sdk.client.batches.list(limit=1, after=made[0])
    assert page.data == [] or page.data[0].id not in made
    assert len(idle_sdk.client.batches.list().data) == 20


def native(sdk: Sdk, batch_id: str) -> dict[str, Any]:
    answer = sdk.get(f"/v1/batches/{batch_id}", params={"format": "native"})
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body


def set_row(running: Running, table: str, row_id: str, **values: Any) -> None:
    """Change what the store knows, as time passing would."""
    engine = database.connect(running.site.settings.resolved_database_url)
    columns = getattr(database, table)
    writing = engine.connect().execution_options(**{database.WRITES: True})
    with writing as connection, connection.begin():
        connection.execute(columns.update().where(columns.c.id == row_id).values(**values))
    engine.dispose()
