"""Random lives of batches: whatever happens, in whatever order, the promises hold.

A story is about a dozen events: files and batches come, are checked, run, crash at every step, are
cancelled, run out of time, are retried and deleted. After each event the API is asked for all
batches; at the story's end everything is brought to an end. The suite tells 120 stories; 1,000 and
more: `HYPOTHESIS_PROFILE=search pytest tests/acceptance/test_life_stories.py`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batch_app.core import Batch, BatchStatus
from support.sdk import CHAT, jsonl, line
from support.stories import LEASE_S, Crash, World

pytestmark = pytest.mark.long

#: What the contract allows to be seen, one step after the other; not read from the code's table.
NEXT = {
    "validating": {"failed", "in_progress", "cancelling"},
    "in_progress": {"finalizing", "expired", "failed", "cancelling"},
    "finalizing": {"completed", "failed", "cancelling"},
    "cancelling": {"cancelled"},
    "completed": set(),
    "failed": set(),
    "expired": set(),
    "cancelled": set(),
}
FINISHED = {status for status, following in NEXT.items() if not following}
STAMPS = [
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
]
BAD_FILES = [b"", b"\n", b"{}\n", jsonl([line("r0"), line("r0")]), jsonl([line("r0", "nobody")])]

numbers = st.integers(min_value=0, max_value=9)
one_in_four = st.sampled_from([False, False, False, True])


def any_is(*statuses: str) -> Callable[[LifeStory], bool]:
    return lambda self: any(batch["status"] in statuses for batch in self.seen.values())


def reachable(status: str) -> set[str]:
    """This state, and all that may come after it."""
    found = {status}
    for following in NEXT[status]:
        found |= reachable(following)
    return found


class LifeStory(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        world.reset()
        self.inputs: dict[str, list[str]] = {}  # the ids of each batch's lines; none: bad ones
        self.never_published: set[str] = set()
        self.seen: dict[str, dict[str, Any]] = {}
        self.files: list[str] = []

    # -- what clients do -----------------------------------------------------------------------

    @rule(
        words=st.lists(st.sampled_from([2, 2, 5]), min_size=1, max_size=4),
        two_models=st.booleans(),
        window=st.sampled_from(["1h", "24h"]),
        unchecked=one_in_four,
    )
    def create(self, words: list[int], two_models: bool, window: str, unchecked: bool) -> None:
        """A good file; of the requests with five words, the model with little context fails."""
        requests = [
            line(f"r{n}", "sim" if two_models and n % 2 else "tiny-context", f"s{n} " * num)
            for n, num in enumerate(words)
        ]
        self.submit(jsonl(requests), [request["custom_id"] for request in requests], window)
        if not unchecked:
            self.world.validate()

    @precondition(lambda self: [] not in self.inputs.values())
    @rule(content=st.sampled_from(BAD_FILES))
    def create_bad(self, content: bytes) -> None:
        self.submit(content, [], "24h")

    def submit(self, content: bytes, custom_ids: list[str], window: str) -> None:
        answer = self.world.client.post(
            "/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": "batch"}
        )
        file_id = answer.json()["id"]
        self.files.append(file_id)
        wish = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": window}
        answer = self.world.client.post("/v1/batches", json=wish)
        assert answer.status_code == 200, answer.text
        self.inputs[answer.json()["id"]] = custom_ids

    @precondition(lambda self: self.seen)
    @rule(which=numbers, native=one_in_four)
    def cancel(self, which: int, native: bool) -> None:
        batch_id = self.pick(which)
        path = f"/v1/batches/{batch_id}"
        if not native:
            assert self.world.client.post(f"{path}/cancel").status_code in (200, 409)
        elif self.world.client.delete(path).status_code == 200:
            self.never_published.add(batch_id)

    @precondition(lambda self: self.with_failures())
    @rule(which=numbers)
    def retry(self, which: int) -> None:
        failures = self.with_failures()
        batch_id = failures[which % len(failures)]
        answer = self.world.client.post(f"/v1/batches/{batch_id}/retry")
        assert answer.status_code in (200, 404), answer.text  # 404: its input was deleted
        if answer.status_code == 200:
            again = answer.json()
            assert again["retry_of"] == batch_id
            failed = [result["custom_id"] for result in self.published(self.seen[batch_id])[1]]
            assert again["request_counts"]["total"] == len(failed) > 0
            self.inputs[again["id"]] = failed
            self.files.append(again["input_file_id"])

    @precondition(lambda self: self.files and any_is(*FINISHED)(self))
    @rule(which=numbers)
    def delete_file(self, which: int) -> None:
        file_id = self.files[which % len(self.files)]
        answer = self.world.client.delete(f"/v1/files/{file_id}")
        users = [batch for batch in self.seen.values() if batch["input_file_id"] == file_id]
        if answer.status_code == 200:
            assert all(batch["status"] in FINISHED for batch in users)
            self.files.remove(file_id)
        else:
            assert answer.status_code == 409

    # -- what happens to them ------------------------------------------------------------------

    @rule(
        what=st.sampled_from(["validation", "housekeeping"]),
        dies_before=st.sampled_from(
            [None, None, None, BatchStatus.QUEUED, BatchStatus.CANCELLED, BatchStatus.EXPIRED]
        ),
    )
    def serve(self, what: str, dies_before: BatchStatus | None) -> None:
        """The server's background threads get their turn."""
        if what == "validation":
            self.world.validate(dies_before)
        else:
            self.world.keep_house(dies_before)

    @precondition(any_is("in_progress", "finalizing", "cancelling"))
    @rule(unnoticed=one_in_four)
    def run_to_the_end(self, unnoticed: bool) -> None:
        self.work(unnoticed)

    @precondition(any_is("in_progress", "finalizing", "cancelling"))
    @rule(
        unnoticed=one_in_four,
        answers=st.integers(0, 3),
        what=st.sampled_from(["dies", "dies untold", "stops", "cancel", "expire"]),
    )
    def run_a_part(self, unnoticed: bool, answers: int, what: str) -> None:
        def event(batch: Batch, stop: threading.Event) -> None:
            if what.startswith("dies"):
                raise Crash
            if what == "stops":
                stop.set()
            if what == "cancel":
                self.world.client.post(f"/v1/batches/{batch.id}/cancel")
            if what == "expire":
                assert batch.expires_at
                self.world.now = max(self.world.now, batch.expires_at)

        self.work(unnoticed, answers=answers, event=event, untold=what == "dies untold")

    @precondition(any_is("in_progress", "finalizing", "cancelling"))
    @rule(
        unnoticed=one_in_four,
        at=st.sampled_from(
            [
                BatchStatus.FINALIZING,
                BatchStatus.COMPLETED,
                BatchStatus.CANCELLED,
                BatchStatus.EXPIRED,
            ]
        ),
        after=st.booleans(),
    )
    def die_at_a_change(self, unnoticed: bool, at: BatchStatus, after: bool) -> None:
        if after:
            self.work(unnoticed, dies_after=at)
        else:
            self.work(unnoticed, dies_before=at)

    def work(self, unnoticed: bool, **how: Any) -> None:
        """`unnoticed`: nobody knows yet that the worker before is dead."""
        if not unnoticed:
            self.world.store.release_dead("worker")
        self.world.work(**how)

    @rule(seconds=st.sampled_from([LEASE_S + 1, 1000.0, 3600.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # -- the promises --------------------------------------------------------------------------

    @invariant()
    def what_is_seen_is_legal(self) -> None:
        page = self.world.client.get("/v1/batches", params={"limit": 100}).json()
        assert {batch["id"] for batch in page["data"]} == set(self.inputs)
        for batch in page["data"]:
            self.look_at(batch)

    def look_at(self, batch: dict[str, Any]) -> None:
        counts = batch["request_counts"]
        assert 0 <= counts["completed"] + counts["failed"] <= counts["total"]
        before = self.seen.get(batch["id"])
        self.seen[batch["id"]] = batch
        if before:
            assert batch["status"] in reachable(before["status"]), before["status"]
            for name, count in before["request_counts"].items():
                assert counts[name] >= count, name
            for name in STAMPS:
                assert before[name] in (None, batch[name]), name
        stamps = [batch[name] for name in ("created_at", *STAMPS) if batch[name] is not None]
        assert max(stamps) <= self.world.now.timestamp()
        if batch["status"] != "validating":
            assert batch[f"{batch['status']}_at"] is not None
        if batch["status"] in FINISHED and (not before or before["status"] not in FINISHED):
            self.look_at_the_end(batch)

    def look_at_the_end(self, batch: dict[str, Any]) -> None:
        output, errors = self.published(batch)
        counts, expected = batch["request_counts"], self.inputs[batch["id"]]
        if not expected:
            assert batch["status"] in ("failed", "cancelled")
            assert (batch["errors"] is not None) == (batch["status"] == "failed")
        if not expected or batch["id"] in self.never_published or not counts["total"]:
            assert output == errors == []
            return
        assert counts["total"] == len(expected)
        published = [result["custom_id"] for result in output + errors]
        assert sorted(published) == sorted(expected)
        assert len(output) == counts["completed"]
        assert len([result for result in errors if result["response"]]) == counts["failed"]
        if batch["status"] == "completed":
            assert counts["completed"] + counts["failed"] == counts["total"]
        for result in output:
            said = result["response"]["body"]["choices"][0]["message"]["content"]
            assert said.split()[0] == f"s{result['custom_id'][1:]}"
        for result in errors:
            if result["response"] is None:
                assert result["error"]["code"] == f"batch_{batch['status']}"

    def published(self, batch: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """The lines of the output and of the error file."""
        files = []
        for file_id in (batch["output_file_id"], batch["error_file_id"]):
            raw = b""
            if file_id is not None:
                answer = self.world.client.get(f"/v1/files/{file_id}/content")
                assert answer.status_code == 200
                raw = answer.content
            files.append([json.loads(result) for result in raw.splitlines()])
        return files[0], files[1]

    def pick(self, which: int) -> str:
        """One of the batches; the newest of the unfinished ones go first."""
        newest = list(reversed(self.seen.values()))
        line = sorted(newest, key=lambda batch: batch["status"] in FINISHED)
        batch_id: str = line[which % min(len(line), 4)]["id"]
        return batch_id

    def with_failures(self) -> list[str]:
        """The batches that can be retried, those that also had successes first."""
        found = [batch for batch in self.seen.values() if batch["error_file_id"]]
        found.sort(key=lambda batch: batch["output_file_id"] is None)
        return [batch["id"] for batch in found]

    def teardown(self) -> None:
        """Everybody comes back to work: every batch ends."""
        world = self.world
        world.pass_time(2 * LEASE_S + 1000)
        for _ in range(50):
            if not (world.validate() or world.keep_house() or world.work()):
                break
        self.what_is_seen_is_legal()
        assert all(batch["status"] in FINISHED for batch in self.seen.values())
        assert list(world.data.incoming.iterdir()) == []


@pytest.mark.timeout(3600)
def test_random_lives_keep_the_promises(tmp_path_factory: pytest.TempPathFactory) -> None:
    searching = hypothesis.settings.get_current_profile_name() == "search"
    settings = hypothesis.settings(
        max_examples=1000 if searching else 120,
        stateful_step_count=14,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with World(tmp_path_factory.mktemp("stories")) as world:
        run_state_machine_as_test(lambda: LifeStory(world), settings=settings)
