"""Answers with characters that many readers take for ends of lines: every file can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from openai import OpenAI
from starlette.requests import Request
from starlette.responses import Response

from batch_app.core import BatchStatus, TokenCounts, utc_now
from batch_app.finalize import publish
from batch_app.index import Index
from batch_app.results import ResultsLog
from integration.api_fixtures import Api, request_line
from support.model_server import ModelServerStub, serving
from support.site import REPO, Site

TEXT = "one\u2028two\u0085three\u2029four"
#: As `shared/cases` has it.
CASE = {
    "custom_id": "e",
    "method": "POST",
    "url": "/v1/completions",
    "body": {
        "model": "demo",
        "prompt": "one\u2028two\u0085three",
        "echo": True,
        "max_tokens": 4,
        "temperature": 0,
    },
}
SHARED = REPO.parent / "shared" / "cases" / "02_line_separator_in_answer.jsonl"


def line(number: int, prompt: str = "say it") -> dict[str, Any]:
    return {
        "custom_id": f"r{number}\u2028",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "remote", "prompt": prompt, "max_tokens": 4},
    }


async def raw_answer(request: Request) -> Response:
    """As vLLM writes it: nothing is escaped that need not be."""
    if b"wrong" in await request.body():
        return Response(
            json.dumps({"error": {"message": TEXT, "type": "X", "code": 400}}, ensure_ascii=False),
            400,
        )
    answer = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "served-name",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }
    return Response(json.dumps(answer, ensure_ascii=False), media_type="application/json")


@pytest.fixture
def server() -> Iterator[ModelServerStub]:
    with serving(fault=raw_answer) as server:
        yield server


@pytest.fixture
def site(tmp_path: Path, server: ModelServerStub) -> Iterator[Site]:
    site = Site(tmp_path, poll_interval_s=0.2, min_free_bytes=0)
    with site.settings.models.open("a") as registry:
        registry.write(
            f'[[model]]\nname = "remote"\nengine = "openai"\nsource = "served-name"\n'
            f'[model.engine_args]\nbase_url = "{server.base_url}"\n'
        )
    yield site
    site.close()


def test_every_download_has_a_line_for_each_request(site: Site) -> None:
    url = site.start_server()
    site.start_worker()
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    lines = [line(n, "wrong" if n % 3 == 0 else "say it") for n in range(9)]
    content = b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in lines)
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    site.wait_until_done(batch.id)
    batch = client.batches.retrieve(batch.id)

    # What a client gave us comes back byte for byte.
    assert client.files.content(file.id).content == content
    assert batch.output_file_id
    assert batch.error_file_id
    good = read(client.files.content(batch.output_file_id).iter_lines())
    bad = read(client.files.content(batch.error_file_id).iter_lines())
    assert [len(good), len(bad)] == [6, 3]
    assert {each["response"]["body"]["choices"][0]["text"] for each in good} == {TEXT}
    assert {each["response"]["body"]["error"]["message"] for each in bad} == {TEXT}
    for query, expected in (("", 9), ("?status=failed", 3), ("?status=completed", 6)):
        results = f"{url}/v1/batches/{batch.id}/results{query}"
        with httpx.stream("GET", results, timeout=120) as answer:
            found = read(answer.iter_lines())
        assert len(found) == expected
        assert all(each["custom_id"].endswith("\u2028") for each in found)
    again = httpx.post(f"{url}/v1/batches/{batch.id}/retry", timeout=120).json()
    of_retry = site.store.get_batch(again.get("batch_id") or again["id"])
    retried = client.files.content(of_retry.input_file_id)
    assert read(retried.iter_lines()) == [each for n, each in enumerate(lines) if n % 3 == 0]


def read(lines: Iterator[str]) -> list[dict[str, Any]]:
    """Raises where a line is not JSON."""
    return [json.loads(each) for each in lines]


def test_a_results_log_from_before_is_escaped_when_it_is_published(api: Api) -> None:
    content = b"".join(request_line(f"r{number}") for number in range(3))
    batch_id = api.submit(content).json()["batch_id"]
    batch = api.store.claim_next("worker", 30, utc_now())
    assert batch is not None
    old = [
        json.dumps(
            {
                "id": "x",
                "custom_id": f"r{number}",
                "response": {"status_code": status, "request_id": "y", "body": {"text": TEXT}},
                "error": None,
            },
            ensure_ascii=False,
        ).encode()
        for number, status in enumerate((200, 400, 200))
    ]
    log = ResultsLog(api.data.work_dir(batch_id), 3, batch.epoch)
    for number, status in enumerate((200, 400, 200)):
        log.append(number, status, TokenCounts(), old[number])
    log.commit()
    # While it runs, too.
    answer = api.get(f"/v1/batches/{batch_id}/results")
    assert answer.headers["x-results-complete"] == "false"
    assert [orjson.loads(each) for each in answer.text.splitlines()] == [
        orjson.loads(each) for each in old
    ]

    index = Index.load(api.data.work_dir(batch_id))
    for unfinished in (None, None):  # as after a crash
        published = publish(api.data, batch, index, log, unfinished, utc_now())
    log.close()
    paths = [api.data.output_file(file.id) for file in published.files]
    paths.append(api.data.results_file(batch))
    num_lines = []
    for path in paths:
        lines = path.read_text().splitlines()
        num_lines.append(len(lines))
        assert all(orjson.loads(each)["response"]["body"] == {"text": TEXT} for each in lines)
    assert num_lines == [2, 1, 3]


def test_all_good_results_of_a_log_from_before(api: Api) -> None:
    batch_id = api.submit(request_line("r0")).json()["batch_id"]
    batch = api.store.claim_next("worker", 30, utc_now())
    assert batch is not None
    log = ResultsLog(api.data.work_dir(batch_id), 1, batch.epoch)
    log.append(0, 200, TokenCounts(), json.dumps({"t": TEXT}, ensure_ascii=False).encode())
    log.commit()
    index = Index.load(api.data.work_dir(batch_id))
    published = publish(api.data, batch, index, log, None, utc_now())
    log.close()
    assert published.output is not None
    assert len(api.data.output_file(published.output.id).read_text().splitlines()) == 1


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("source", ["of our own", "shared"])
def test_vllm_echoes_a_line_separator(tmp_path: Path, source: str) -> None:
    case = CASE
    if source == "shared":
        if not SHARED.exists():
            pytest.skip(f"there is no {SHARED}")
        case = orjson.loads(SHARED.read_bytes())
    site = Site(tmp_path)
    try:
        batch_id = site.submit([case, case | {"custom_id": "f"}], "demo")
        site.start_worker()
        batch = site.wait_until_done(batch_id)
        assert (batch.status, batch.progress.completed) == (BatchStatus.COMPLETED, 2)
        lines = site.data.results_file(batch).read_text().splitlines()
        assert len(lines) == 2
        text = orjson.loads(lines[0])["response"]["body"]["choices"][0]["text"]
        assert text.startswith(case["body"]["prompt"])
    finally:
        site.close()
