"""The OpenAI SDK, unmodified, on a server of ours; and what its tests do again and again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import DefaultHttpxClient, OpenAI
from openai.types import Batch

from support.site import ENDLESS
from support.waiting import PATIENCE_S, wait_for

CHAT = "/v1/chat/completions"
FINISHED = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, model: str = "sim", say: str | None = None, **body: Any) -> dict[str, Any]:
    """A request that the simulated engine answers with its own words."""
    messages = [{"role": "user", "content": say or f"say {custom_id}"}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": CHAT,
        "body": {"model": model, "messages": messages, **body},
    }


def lines(num: int, model: str = "sim", **body: Any) -> list[dict[str, Any]]:
    return [line(f"r{number}", model, **body) for number in range(num)]


def jsonl(requests: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


@dataclass
class Sdk:
    """A client of a server. `sent` has every request that went over the wire, in order."""

    url: str
    sent: list[httpx.Request] = field(default_factory=list)
    received: list[httpx.Response] = field(default_factory=list)

    def __post_init__(self) -> None:
        hooks: dict[str, list[Callable[..., Any]]] = {
            "request": [self.sent.append],
            "response": [self.received.append],
        }
        self.http = DefaultHttpxClient(event_hooks=hooks)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=self.http)

    def close(self) -> None:
        self.client.close()

    def get(self, path: str, **options: Any) -> httpx.Response:
        """A call beside the SDK, for what it has no method for."""
        return self.http.get(f"{self.url}{path}", **options)

    def upload(self, content: bytes | Iterable[dict[str, Any]], name: str = "in.jsonl") -> str:
        """Returns the file's id."""
        raw = content if isinstance(content, bytes) else jsonl(content)
        return self.client.files.create(file=(name, raw), purpose="batch").id

    def create(self, content: bytes | Iterable[dict[str, Any]], **options: Any) -> Batch:
        """Upload, and create a batch of it."""
        return self.create_from(self.upload(content), **options)

    def create_from(self, file_id: str, **options: Any) -> Batch:
        wish: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"} | options
        return self.client.batches.create(input_file_id=file_id, **wish)

    def wait(self, batch: Batch | str, *statuses: str, timeout_s: float = PATIENCE_S) -> Batch:
        """Poll until the batch has one of these statuses; by default: until it has finished."""
        batch_id = batch if isinstance(batch, str) else batch.id
        wanted = statuses or FINISHED
        last: list[Batch] = []

        def look() -> Batch | None:
            last[:] = [self.client.batches.retrieve(batch_id)]
            return last[0] if last[0].status in wanted else None

        found = wait_for(look, timeout_s=timeout_s, every_s=0.05, what=f"{batch_id}: {wanted}")
        assert found
        return found

    def run(self, content: bytes | Iterable[dict[str, Any]], **options: Any) -> Batch:
        return self.wait(self.create(content, **options))

    def results(self, file_id: str | None) -> list[dict[str, Any]]:
        """The lines of an output or error file; none where there is no file."""
        if file_id is None:
            return []
        raw = self.client.files.content(file_id).content
        return [json.loads(result) for result in raw.splitlines()]

    def outcomes(self, batch: Batch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The lines of both files of a finished batch."""
        return self.results(batch.output_file_id), self.results(batch.error_file_id)


def ids(results: Iterable[dict[str, Any]]) -> list[str]:
    return [result["custom_id"] for result in results]


def assert_each_once(sdk: Sdk, batch: Batch, custom_ids: Iterable[str]) -> None:
    """Every input id stands exactly once in output + error, in input order in each."""
    order = list(custom_ids)
    output, errors = (ids(results) for results in sdk.outcomes(batch))
    assert sorted(output + errors) == sorted(order)
    place = {custom_id: number for number, custom_id in enumerate(order)}
    for part in (output, errors):
        assert part == sorted(part, key=place.__getitem__)


#: The times of a batch, in the order they can come in.
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
    batch = sdk.create(lines(ENDLESS, "endless"))
    wait_for(lambda: native(sdk, batch.id)["status"] == "running", what="the worker begins")
    return batch


def native(sdk: Sdk, batch_id: str) -> dict[str, Any]:
    answer = sdk.get(f"/v1/batches/{batch_id}", params={"format": "native"})
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    return body
