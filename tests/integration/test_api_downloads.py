"""Downloads: ranges, validators and compression, for results and for the content of files."""

from __future__ import annotations

import gzip
import json
import os
import random

import pytest
import requests

from batch_app.core import BatchStatus, TokenCounts, utc_now
from batch_app.results import ResultsLog
from integration.api_fixtures import Api, input_file

PLAIN = {"accept-encoding": "identity"}
GZIP = {"accept-encoding": "gzip"}


def line(number: int, status: int = 200) -> bytes:
    words = random.Random(number).choices(["alpha", "beta", "gamma", "delta"], k=40)
    response = {"status_code": status, "request_id": f"req_{number}", "body": {"text": words}}
    return json.dumps({"custom_id": f"r{number}", "response": response, "error": None}).encode()


def finished(api: Api, num_lines: int) -> tuple[str, bytes]:
    """The path of a finished batch's results, and what lies there."""
    batch_id = api.submitted(3)
    batch = api.store.claim_next("worker", 30, utc_now())
    assert batch is not None
    whole = b"".join(
        line(number, 400 if number == 1 else 200) + b"\n" for number in range(num_lines)
    )
    api.data.results_file(batch).write_bytes(whole)
    batch = api.store.transition(batch, BatchStatus.FINALIZING, utc_now())
    api.store.transition(batch, BatchStatus.COMPLETED, utc_now())
    return f"/v1/batches/{batch_id}/results", whole


def uploaded(api: Api, num_lines: int) -> tuple[str, bytes]:
    """The path of a file's content, and what lies there."""
    whole = input_file(num_lines)
    answer = requests.post(
        f"{api.url}/v1/files",
        files={"file": ("in.jsonl", whole)},
        data={"purpose": "batch"},
        timeout=120,
    )
    return f"/v1/files/{answer.json()['id']}/content", whole


@pytest.fixture
def results(api: Api) -> tuple[str, bytes]:
    return finished(api, 12_000)


@pytest.fixture(params=[finished, uploaded], ids=["results", "content"])
def download(request: pytest.FixtureRequest, api: Api) -> tuple[str, bytes]:
    path, whole = request.param(api, 12_000)
    assert len(whole) > 3 << 19  # more than one block
    return path, whole


def raw(answer: requests.Response) -> bytes:
    """The bytes that went over the line."""
    return bytes(answer.raw.read(decode_content=False))


def test_as_it_is_unless_asked(api: Api, download: tuple[str, bytes]) -> None:
    path, whole = download
    # None: the header isn't sent at all.
    for headers in ({"accept-encoding": None}, PLAIN):
        answer = api.get(path, headers=headers, stream=True)
        assert raw(answer) == whole
        assert int(answer.headers["content-length"]) == len(whole)
        assert "content-encoding" not in answer.headers
        assert answer.headers["accept-ranges"] == "bytes"
        # Of a file's content there is no other form, which a cache would have to keep apart.
        assert answer.headers.get("vary") == (None if "/files/" in path else "Accept-Encoding")


def test_the_content_of_a_file_is_never_compressed(api: Api) -> None:
    """Clients in between take the bytes for the file's: OpenAI sends them as they are."""
    path, whole = uploaded(api, 3)
    for accepted in ("gzip", "gzip, deflate, br", "gzip;q=1, identity;q=0"):
        answer = api.get(path, headers={"accept-encoding": accepted}, stream=True)
        assert raw(answer) == whole
        assert "content-encoding" not in answer.headers
        assert int(answer.headers["content-length"]) == len(whole)
        assert answer.headers["etag"] == api.get(path, headers=PLAIN).headers["etag"]


def test_compressed_when_asked(api: Api, results: tuple[str, bytes]) -> None:
    path, whole = results
    answer = api.get(path, headers=GZIP, stream=True)
    sent = raw(answer)

    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.headers["content-type"] == "application/jsonl"
    assert "content-length" not in answer.headers
    assert "accept-ranges" not in answer.headers
    assert len(sent) < len(whole) / 3
    assert gzip.decompress(sent) == whole
    assert answer.headers["etag"] != api.get(path, headers=PLAIN).headers["etag"]
    assert raw(api.get(path, headers=GZIP, stream=True)) == sent


@pytest.mark.parametrize(
    ("accepted", "compresses"),
    [
        ("gzip, deflate, br", True),
        ("br;q=1.0, GZIP;q=0.5", True),
        ("x-gzip", True),
        ("gzip;q=0", False),
        ("gzip; q=0.3, identity;q=0.9", False),
        ("gzip;q=nonsense", False),
        ("*", False),
        ("br", False),
        ("", False),
    ],
)
def test_what_a_client_may_say(api: Api, accepted: str, compresses: bool) -> None:
    path, whole = finished(api, 3)
    answer = api.get(path, headers={"accept-encoding": accepted}, stream=True)
    assert ("content-encoding" in answer.headers) == compresses
    sent = raw(answer)
    assert (gzip.decompress(sent) if compresses else sent) == whole


def test_a_download_that_was_cut_off_is_resumed(api: Api, download: tuple[str, bytes]) -> None:
    path, whole = download
    etag = api.get(path, headers=PLAIN).headers["etag"]
    for validator in ({}, {"if-range": etag}):
        # Also from a client that would take gzip: a range is of the bytes as they are.
        headers = GZIP | validator | {"range": "bytes=1500000-"}
        answer = api.get(path, headers=headers, stream=True)
        assert answer.status_code == 206
        assert "content-encoding" not in answer.headers
        assert raw(answer) == whole[1_500_000:]
        assert answer.headers["content-range"] == f"bytes 1500000-{len(whole) - 1}/{len(whole)}"
        assert int(answer.headers["content-length"]) == len(whole) - 1_500_000
        assert answer.headers["etag"] == etag


def test_no_range_of_something_else(api: Api, results: tuple[str, bytes]) -> None:
    path, whole = results
    compressed = api.get(path, headers=GZIP).headers["etag"]
    for other in (compressed, '"other"', "Mon, 01 Jan 2001 00:00:00 GMT"):
        answer = api.get(path, headers=PLAIN | {"range": "bytes=100-", "if-range": other})
        assert answer.status_code == 200
        assert answer.content == whole


def test_what_is_known_is_not_sent_again(api: Api, download: tuple[str, bytes]) -> None:
    path, whole = download
    for headers in (PLAIN, GZIP):
        first = api.get(path, headers=headers)
        for validator in (
            {"if-none-match": first.headers["etag"]},
            {"if-none-match": f'"a", W/{first.headers["etag"]}'},
            {"if-none-match": "*"},
            {"if-modified-since": first.headers["last-modified"]},
        ):
            answer = api.get(path, headers=headers | validator)
            assert (answer.status_code, answer.content) == (304, b"")
            assert answer.headers["etag"] == first.headers["etag"]
        for validator in (
            {"if-none-match": '"a"'},
            {"if-none-match": '"a"', "if-modified-since": first.headers["last-modified"]},
            {"if-modified-since": "Mon, 01 Jan 2001 00:00:00 GMT"},
            {"if-modified-since": "yesterday"},
        ):
            answer = api.get(path, headers=headers | validator)
            assert (answer.status_code, answer.content) == (200, whole)


def test_head(api: Api, download: tuple[str, bytes]) -> None:
    path, whole = download
    for headers in (PLAIN, GZIP, PLAIN | {"range": "bytes=10-29"}):
        got = api.get(path, headers=headers, stream=True)
        head = api.call("HEAD", path, headers=headers)
        assert head.status_code == got.status_code
        assert head.content == b""
        ignored = {"date", "x-request-id", "transfer-encoding"}
        assert {name: value for name, value in head.headers.items() if name not in ignored} == {
            name: value for name, value in got.headers.items() if name not in ignored
        }
        got.close()
    missing = path.replace(path.split("/")[3], path.split("/")[3][:-4] + "0000")
    assert api.call("HEAD", missing).status_code == 404
    assert int(api.call("HEAD", path, headers=PLAIN).headers["content-length"]) == len(whole)


def test_a_choice_of_the_results_compressed(api: Api) -> None:
    path, whole = finished(api, 50)
    lines = whole.splitlines(keepends=True)
    for query, expected in [
        ("?status=failed", lines[1]),
        ("?status=completed", b"".join(lines[:1] + lines[2:])),
    ]:
        answer = api.get(path + query, headers=GZIP, stream=True)
        assert answer.headers["content-encoding"] == "gzip"
        assert gzip.decompress(raw(answer)) == expected
        head = api.call("HEAD", path + query, headers=GZIP)
        assert head.headers["content-encoding"] == "gzip"


def test_results_so_far_compressed(api: Api) -> None:
    batch_id = api.submitted(3)
    batch = api.store.claim_next("worker", 30, utc_now())
    assert batch is not None
    log = ResultsLog(api.data.work_dir(batch_id), 3, batch.epoch)
    log.append(1, 200, TokenCounts(1, 1), line(1))
    log.commit()
    path = f"/v1/batches/{batch_id}/results"

    answer = api.get(path, headers=GZIP, stream=True)

    assert answer.headers["x-results-complete"] == "false"
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw(answer)) == line(1) + b"\n"
    head = api.call("HEAD", path, headers=PLAIN)
    assert head.headers["x-results-complete"] == "false"
    assert "content-length" not in head.headers
    log.close()


def test_a_file_that_was_changed_has_another_tag(api: Api) -> None:
    path, whole = finished(api, 5)
    before = api.get(path).headers["etag"]
    [results] = (api.data.batches / "output").iterdir()
    results.write_bytes(whole + line(5) + b"\n")
    os.utime(results, (1, 1))
    answer = api.get(path, headers=PLAIN | {"if-none-match": before})
    assert answer.status_code == 200
    assert answer.content.endswith(line(5) + b"\n")
