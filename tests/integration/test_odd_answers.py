"""A batch on a server that answers odd things: it ends, with every request once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.requests import Request
from starlette.responses import Response

from batch_app.client.answers import write_answers
from batch_app.client.results import result_of
from batch_app.core import MAX_TOKENS, BatchStatus
from batch_app.dashboard.failures import grouped
from batch_app.routes.downloads import has_failed
from batch_app.wire.lines import as_run_batch
from support.model_server import ModelServerStub, serving
from support.site import REPO, Site, echo_line

CASES = REPO.parent / "shared" / "cases"


@pytest.fixture
def server() -> Iterator[ModelServerStub]:
    with serving() as server:
        yield server


@pytest.fixture
def site(tmp_path: Path, server: ModelServerStub) -> Iterator[Site]:
    site = Site(tmp_path, lease_s=60.0, heartbeat_s=0.3, drain_s=5.0, poll_interval_s=0.5)
    with site.settings.models.open("a") as registry:
        registry.write(f"""
[[model]]
name = "remote"
engine = "openai"
source = "served-name"
[model.engine_args]
base_url = "{server.base_url}"
max_retries = 1
backoff_s = 0.02
max_backoff_s = 0.1
""")
    yield site
    site.close()


def answered(text: object = "fine", **fields: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"model": "served-name", "choices": [choice], **fields}).encode()


def counting(**usage: Any) -> bytes:
    return answered(usage=usage)


#: The answer to a request, and the tokens that it counts for; None: it fails.
ODD: list[tuple[bytes, tuple[int, int] | None]] = [
    (counting(prompt_tokens=3, completion_tokens=-35), (3, 0)),
    (counting(prompt_tokens=-1, completion_tokens=4), (0, 4)),
    (counting(prompt_tokens=1, completion_tokens=2**32), (1, MAX_TOKENS)),
    (counting(prompt_tokens=2**63, completion_tokens=2**64), (MAX_TOKENS, MAX_TOKENS)),
    (counting(prompt_tokens=2**70, completion_tokens=5), (MAX_TOKENS, 5)),
    (counting(prompt_tokens=-(2**70), completion_tokens=5), (0, 5)),
    (counting(prompt_tokens=12.0, completion_tokens=3.7), (12, 3)),
    (counting(prompt_tokens=1e300, completion_tokens=True), (MAX_TOKENS, 0)),
    (counting(prompt_tokens="12", completion_tokens=6), (0, 6)),
    (counting(prompt_tokens=None, completion_tokens=[7]), (0, 0)),
    (counting(prompt_tokens={}, completion_tokens=7), (0, 7)),
    (counting(prompt_tokens=2, completion_tokens=7, prompt_tokens_details=5), (2, 7)),
    (
        counting(
            prompt_tokens=2,
            completion_tokens=7,
            prompt_tokens_details={"cached_tokens": 2**70},
            completion_tokens_details={"reasoning_tokens": -5},
        ),
        (2, 7),
    ),
    (answered(usage="many"), (0, 0)),
    (answered(usage=[1, 2]), (0, 0)),
    (answered(id=2**70, created=-1.5e300, object=None), (0, 0)),
    (answered("\ud83d half a smile"), (0, 0)),
    (answered(["parts", {"type": "text", "text": 5}]), (0, 0)),
    (answered({"deep": json.loads("[" * 190 + "]" * 190)}), (0, 0)),
    (answered("x" * 3_000_000), (0, 0)),
    (b'{"choices":[{"message":5,"finish_reason":7}]}', (0, 0)),
    (b'{"choices":[{"message":{"content":"caf\xe9"}}]}', (0, 0)),
    (b'{"choices":[{}],"error":{"code":429}}', (0, 0)),
    (b'{"choices":[]}', None),
    (b'{"choices":null}', None),
    (b'{"choices":[null]}', None),
    (b"{}", None),
    (b"[]", None),
    (b"", None),
    (b'{"error":{"message":"No.","code":400}}', None),
    (b'{"error":{"message":["odd"],"code":{"a":1},"type":7}}', None),
    (b'{"error":"No."}', None),
    (b'{"error":["No."]}', None),
    (b'{"error":{"message":"Down.","code":500}}', None),
    (b'\xef\xbb\xbf{"choices":[{}]}', None),
    (b'data: {"choices":[{}]}\n\ndata: [DONE]\n\n', None),
    (b'{"choices":[{"logprob":NaN}]}', None),
    (b'{"choices":[' + b"[" * 2000 + b"]" * 2000 + b"]}", None),
    (b'{"usage":' * 100_000, None),
    (b'{"choices":[{"text":"cut', None),
]


def test_no_single_answer_fails_a_batch(
    site: Site, server: ModelServerStub, tmp_path: Path
) -> None:
    async def odd(request: Request) -> Response | None:
        said = json.loads(await request.body())["messages"][-1]["content"]
        number = int(said.split()[-1]) if said.startswith("say") else len(ODD)
        # Each second one is like any other.
        if number % 2 or number // 2 >= len(ODD):
            return None
        return Response(ODD[number // 2][0], media_type="application/json")

    server.fault = odd
    num = 2 * len(ODD)
    batch_id = site.submit((echo_line(n) for n in range(num)), "remote")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED, site.log(batch_id)
    num_failed = sum(tokens is None for _, tokens in ODD)
    assert (batch.progress.completed, batch.progress.failed) == (num - num_failed, num_failed)
    assert "engine process ended" not in site.log(batch_id)
    good = [tokens for _, tokens in ODD if tokens is not None]
    assert batch.progress.tokens.prompt_tokens == sum(prompt for prompt, _ in good) + 3 * len(ODD)
    assert batch.progress.tokens.completion_tokens == sum(n for _, n in good) + 3 * len(ODD)
    assert batch.progress.tokens.cached_tokens == 2 + len(ODD)

    lines = site.data.results_file(site.batch(batch_id)).read_bytes().split(b"\n")[:-1]
    results = [json.loads(line) for line in lines]
    assert [one["custom_id"] for one in results] == [f"r{n}" for n in range(num)]
    for number, (sent, tokens) in enumerate(ODD):
        line, result = lines[2 * number], results[2 * number]
        assert has_failed(line) is (tokens is None), sent[:200]
        if tokens is not None and b"\\ud83d" not in sent and b"\xe9" not in sent:
            assert result["response"]["body"] == json.loads(sent) | (
                {"model": "remote"} if b'"model"' in sent else {}
            )
        said = results[2 * number + 1]["response"]["body"]["choices"][0]["message"]["content"]
        assert said == f"say number {2 * number + 1}"
    texts = [result_of(line).text for line in lines]
    assert "\ufffd half a smile" in texts
    assert "caf\ufffd" in texts

    # What reads results: the table of the command line, the pages, and vLLM's own form.
    for kind in ("csv", "parquet"):
        written = write_answers(
            tmp_path / f"answers.{kind}", lambda: map(result_of, lines), parse_json=True
        )
        assert (written.num_rows, written.num_failed) == (num, num_failed)
    assert sum(group.count for group in grouped(lines).groups) == num_failed
    for line in lines:
        orjson.loads(as_run_batch(line))
    assert site.store.totals().progress["remote"].completed == num - num_failed


# -- cases of public bug reports -------------------------------------------------------------------


def case(name: str) -> list[dict[str, Any]]:
    path = CASES / name
    if not path.exists():
        pytest.skip(f"{path} isn't here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def like_negative_usage() -> list[dict[str, Any]]:
    lines = [echo_line(n) for n in range(3)]
    lines[1]["body"]["messages"][0]["content"] = "negative"
    return lines


@pytest.mark.parametrize("source", ["case", "like it"])
def test_a_negative_number_of_tokens_costs_nothing(
    site: Site, server: ModelServerStub, source: str
) -> None:
    lines = case("01_negative_usage.jsonl") if source == "case" else like_negative_usage()

    async def odd(request: Request) -> Response | None:
        if b'"negative"' not in await request.body():
            return None
        usage = {"prompt_tokens": 1, "completion_tokens": -35, "total_tokens": -34}
        return Response(answered("negative", usage=usage), media_type="application/json")

    server.fault = odd
    batch_id = site.submit(lines, "remote")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (len(lines), 0)
    results = site.results(batch_id)
    assert [one["custom_id"] for one in results] == [line["custom_id"] for line in lines]
    assert results[1]["response"]["body"]["usage"]["completion_tokens"] == -35
    assert batch.progress.tokens.completion_tokens >= 2


def like_rerank() -> list[dict[str, Any]]:
    body = {"query": "a", "documents": ["b"]}
    return [{"custom_id": "x", "method": "POST", "url": "/v1/rerank", "body": body}]


@pytest.mark.parametrize("source", ["case", "like it"])
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b'{"error": "Unexpected endpoint or method. (POST /v1/rerank)"}', "400"),
        (b'{"error": {"message": "No such model.", "code": 422}}', "422"),
    ],
)
def test_an_error_with_status_200_is_no_success(
    site: Site, server: ModelServerStub, source: str, answer: bytes, code: str
) -> None:
    lines = case("03_error_with_status_200.jsonl") if source == "case" else like_rerank()

    async def odd(request: Request) -> Response | None:
        is_rerank = request.url.path == "/v1/rerank"
        return Response(answer, media_type="application/json") if is_rerank else None

    server.fault = odd
    batch_id = site.submit(lines, "remote")
    site.start_worker()
    batch = site.wait_until_done(batch_id)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.progress.completed, batch.progress.failed) == (0, 1)
    (line,) = site.results(batch_id)
    assert line["response"]["body"] == json.loads(answer)
    failure = result_of(orjson.dumps(line)).error
    assert failure is not None
    assert failure.code == code
    assert failure.message in ("Unexpected endpoint or method. (POST /v1/rerank)", "No such model.")
