"""Running again only what failed, through the OpenAI SDK."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types import Batch

from support.sdk import (
    Sdk,
    assert_counts,
    assert_each_once,
    busy_worker,
    line,
    lines,
)
from support.site import ENDLESS


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
    with pytest.raises(openai.BadRequestError, match="empty"):
        retry(sdk, refused)
    running = sdk.wait(sdk.create(lines(ENDLESS, "endless")), "in_progress")
    with pytest.raises(openai.ConflictError) as refusal:
        retry(sdk, running)
    assert refusal.value.code == "batch_not_finished"
    sdk.client.batches.cancel(running.id)
    gone = sdk.wait(running)
    sdk.client.files.delete(gone.input_file_id)
    with pytest.raises(openai.NotFoundError):
        retry(sdk, gone)
