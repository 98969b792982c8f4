"""The life of a batch through the OpenAI SDK, and lists of many, on a real server."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime

import openai
import pytest

from acceptance.conftest import Running
from support.sdk import (
    Sdk,
    assert_counts,
    assert_each_once,
    busy_worker,
    ids,
    line,
    lines,
    native,
    stamped,
)
from support.waiting import wait_for


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
    working.site.set_row("files", batch.output_file_id, expires_at=datetime.now(UTC))
    wait_for(lambda: not path.exists(), what="the bytes are gone")
    with pytest.raises(openai.NotFoundError):
        sdk.client.files.content(batch.output_file_id)
    assert sdk.get(f"/v1/batches/{batch.id}/results").status_code == 404


def test_an_expired_input_stays_while_a_batch_needs_it(idle_sdk: Sdk, waiting: Running) -> None:
    batch = idle_sdk.create(lines(2))
    lonely = idle_sdk.upload(lines(2))
    idle_sdk.wait(batch, "in_progress")
    for file_id in (batch.input_file_id, lonely):
        waiting.site.set_row("files", file_id, expires_at=datetime.now(UTC))
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


def test_a_model_that_does_not_load_pauses_its_batch_and_says_so(sdk: Sdk) -> None:
    created = sdk.create(lines(2, "unloadable"))
    paused = wait_for(
        lambda: getattr(sdk.client.batches.retrieve(created.id), "paused", None),
        what="the batch is paused",
    )
    assert paused is not None
    assert (paused["kind"], paused["reason"]) == ("registry", "No such weights.")
    assert paused["retry_at"] is None  # until its registry entry changes
    assert sdk.client.batches.retrieve(created.id).status == "in_progress"
    # Others overtake it meanwhile.
    assert sdk.run(lines(2)).status == "completed"
    sdk.client.batches.cancel(created.id)
    batch = sdk.wait(created.id)
    assert batch.status == "cancelled"
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
