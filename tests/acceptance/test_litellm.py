"""LiteLLM's SDK as a client: an OpenAI-compatible provider at an address of ours."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from acceptance.conftest import Running
from support.sdk import CHAT, Sdk, jsonl, lines
from support.site import ENDLESS
from support.waiting import wait_for

#: Of LiteLLM's own types, which it makes when it needs them first.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:Item '.*' on TypedDict class:UserWarning"),
]


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Imported where it is used: it takes seconds, and otherwise asks the internet for prices."""
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        patched.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        warnings.simplefilter("ignore")  # of its own imports
        import litellm
    return litellm


@pytest.fixture
def server(working: Running) -> dict[str, Any]:
    """What every call of LiteLLM needs to know."""
    return {
        "custom_llm_provider": "openai",
        "api_base": f"{working.url}/v1",
        "api_key": "none",
    }


def test_a_batch_from_file_to_content(litellm: Any, server: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl(lines(12)))
    with path.open("rb") as content:
        file = litellm.create_file(file=content, purpose="batch", **server)
    assert file.id.startswith("file-")
    assert litellm.file_retrieve(file_id=file.id, **server).bytes == path.stat().st_size

    batch = litellm.create_batch(
        completion_window="24h",
        endpoint=CHAT,
        input_file_id=file.id,
        metadata={"run": "7"},
        **server,
    )
    assert batch.metadata == {"run": "7"}

    def finished() -> Any:
        seen = litellm.retrieve_batch(batch_id=batch.id, **server)
        return seen if seen.status == "completed" else None

    done = wait_for(finished, every_s=0.1, what="the batch completes")
    assert (done.request_counts.total, done.request_counts.completed) == (12, 12)
    raw = litellm.file_content(file_id=done.output_file_id, **server).content
    results = [json.loads(result) for result in raw.splitlines()]
    assert [result["custom_id"] for result in results] == [f"r{number}" for number in range(12)]

    listed = litellm.list_batches(limit=5, **server)
    assert batch.id in [seen.id for seen in listed.data]
    assert litellm.file_delete(file_id=file.id, **server).deleted


def test_a_running_batch_is_cancelled(litellm: Any, server: dict[str, Any], sdk: Sdk) -> None:
    batch = sdk.wait(sdk.create(lines(ENDLESS, "endless")), "in_progress")
    cancelled = litellm.cancel_batch(batch_id=batch.id, **server)
    assert cancelled.status in ("cancelling", "cancelled")
    assert sdk.wait(batch).status == "cancelled"
