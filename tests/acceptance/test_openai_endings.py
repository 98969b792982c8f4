"""Batches that are cancelled, expire, or lose their worker, through the OpenAI SDK."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import openai
import pytest

from acceptance.conftest import Running
from support.sdk import (
    Sdk,
    assert_counts,
    assert_each_once,
    busy_worker,
    lines,
    stamped,
)
from support.site import ENDLESS
from support.waiting import wait_for


def test_cancelling_a_running_batch_keeps_what_is_done(sdk: Sdk) -> None:
    batch = sdk.create(lines(ENDLESS, "endless"))

    def some_are_done() -> bool:
        counts = sdk.client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed >= 3

    wait_for(some_are_done, what="3 results")
    answer = sdk.client.batches.cancel(batch.id)
    assert answer.status == "cancelling"
    assert stamped(answer) == ["in_progress_at", "cancelling_at"]
    done = sdk.wait(batch)
    assert done.status == "cancelled"
    assert stamped(done) == ["in_progress_at", "cancelling_at", "cancelled_at"]
    assert done.request_counts
    assert done.request_counts.completed >= 3
    assert_each_once(sdk, done, [f"r{number}" for number in range(ENDLESS)])
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
    done = idle_sdk.wait(batch)
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
    done = idle_sdk.wait(batch)
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
    began = time.monotonic()
    blocker = busy_worker(sdk)
    working.site.wait_for_progress(blocker.id, 1)
    took_s = time.monotonic() - began
    batch = sdk.create(lines(ENDLESS, "endless"), completion_window="1h")
    sdk.wait(batch, "in_progress")
    # The worker reads the end of the window when it begins: a moment after this batch's first
    # answers, by what the one before needed to get there on this machine.
    end = datetime.now(UTC) + timedelta(seconds=3 + 6 * took_s)
    working.site.set_row("batches", batch.id, expires_at=end)
    sdk.client.batches.cancel(blocker.id)
    done = sdk.wait(batch)
    assert done.status == "expired"
    assert stamped(done) == ["in_progress_at", "expired_at"]
    assert done.request_counts
    assert 0 < done.request_counts.completed < ENDLESS
    assert_each_once(sdk, done, [f"r{number}" for number in range(ENDLESS)])
    output, errors = sdk.outcomes(done)
    assert len(output) == done.request_counts.completed
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}


def test_a_queued_batch_expires_without_a_worker(idle_sdk: Sdk, waiting: Running) -> None:
    batch = idle_sdk.create(lines(10), completion_window="1h")
    idle_sdk.wait(batch, "in_progress")
    waiting.site.set_row("batches", batch.id, expires_at=datetime.now(UTC))
    done = idle_sdk.wait(batch)
    assert done.status == "expired"
    assert_each_once(idle_sdk, done, [f"r{number}" for number in range(10)])


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_batch_whose_worker_is_gone_ends_without_one(
    idle_sdk: Sdk, waiting: Running, ending: str
) -> None:
    batch = idle_sdk.create(lines(ENDLESS, "endless"))
    idle_sdk.wait(batch, "in_progress")
    worker = waiting.site.start_worker()
    waiting.site.wait_for_progress(batch.id, 3)
    worker.kill()
    worker.wait(timeout=120)
    if ending == "cancelled":
        idle_sdk.client.batches.cancel(batch.id)
    else:
        waiting.site.set_row("batches", batch.id, expires_at=datetime.now(UTC))
    done = idle_sdk.wait(batch)  # its lease has to run out first
    assert done.status == ending
    assert done.request_counts
    assert done.request_counts.completed >= 3
    assert_each_once(idle_sdk, done, [f"r{number}" for number in range(ENDLESS)])
    assert len(idle_sdk.outcomes(done)[0]) == done.request_counts.completed
