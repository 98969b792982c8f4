"""Bad input gets a clear answer, and leaves nothing: no batch, no file, no log."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

import pytest

from integration.api_fixtures import Api, input_file, request_line

GOOD = request_line("good")

#: name: (content, line of the error or None, code, a piece of the message)
REFUSED: dict[str, tuple[bytes, int | None, str, str]] = {
    "empty file": (b"", None, "empty_file", "empty"),
    "only blank lines": (b"\n  \n\r\n", None, "empty_batch", "blank"),
    "only a byte order mark": (codecs.BOM_UTF8, None, "empty_batch", "blank"),
    "broken JSON": (GOOD + b'{"custom_id": \n', 2, "invalid_json_line", "not valid JSON"),
    "not an object": (b"[1, 2]\n", 1, "invalid_json_line", "object"),
    "NUL bytes": (b"\0" * 100, 1, "invalid_json_line", "not valid JSON"),
    "no custom_id": (
        GOOD + request_line(custom_id=...),
        2,
        "missing_required_parameter",
        '"custom_id"',
    ),
    "empty custom_id": (request_line(""), 1, "invalid_request", "1 to 512"),
    "long custom_id": (request_line("x" * 513), 1, "invalid_request", "1 to 512"),
    "number as custom_id": (request_line(custom_id=7), 1, "invalid_request", "string"),
    "duplicate custom_id": (
        GOOD + request_line("other") + GOOD,
        3,
        "duplicate_custom_id",
        "line 1",
    ),
    "no body": (request_line(body=...), 1, "missing_required_parameter", '"body"'),
    "body is a list": (request_line(body=[]), 1, "invalid_request", "object"),
    "no messages": (request_line(body={}), 1, "missing_required_parameter", '"messages"'),
    "messages is a string": (
        request_line(body={"messages": "hello"}),
        1,
        "invalid_request",
        "list",
    ),
    "message is a string": (
        request_line(body={"messages": ["hello"]}),
        1,
        "invalid_request",
        "Message 0",
    ),
    "temperature is a string": (
        request_line(body={"messages": [{"role": "user"}], "temperature": "hot"}),
        1,
        "invalid_request",
        '"temperature" must be a number',
    ),
    "max_tokens is true": (
        request_line(body={"messages": [{"role": "user"}], "max_tokens": True}),
        1,
        "invalid_request",
        "integer",
    ),
    "method GET": (request_line(method="GET"), 1, "invalid_method", "POST"),
    "unknown url": (request_line(url="/v1/odd"), 1, "invalid_request", "/v1/chat/completions"),
    "url is a list": (request_line(url=[]), 1, "invalid_request", "url"),
    "invalid UTF-8": (
        GOOD + b'{"custom_id": "\xff\xfe", "body": {}}\n',
        2,
        "invalid_json_line",
        "UTF-8",
    ),
    "lone surrogate": (
        b'{"custom_id": "\\ud800", "body": {"messages": [{"role": "user"}]}}\n',
        1,
        "invalid_json_line",
        "not valid JSON",
    ),
    "NaN": (
        b'{"custom_id": "a", "body": {"messages": [{"role": "user"}], "temperature": NaN}}\n',
        1,
        "invalid_json_line",
        "NaN",
    ),
    "10,000 levels of nesting": (
        b'{"custom_id": "a", "body": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001 + b"\n",
        1,
        "invalid_json_line",
        "",
    ),
    "10,000 open brackets": (b"[" * 10_000 + b"\n", 1, "invalid_json_line", ""),
    "stream": (
        request_line(body={"messages": [{"role": "user"}], "stream": True}),
        1,
        "invalid_request",
        "stream",
    ),
    "huge number": (
        request_line(body={"messages": [{"role": "user"}], "max_tokens": 10**30}),
        1,
        "",
        "",
    ),
    "last line without a line feed is broken": (
        GOOD + b"{",
        2,
        "invalid_json_line",
        "not valid JSON",
    ),
}


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_lines(api: Api, name: str, model_first: bool) -> None:
    content, line, code, words = REFUSED[name]

    answer = api.submit(content, model_first=model_first)

    assert answer.status_code == 400, answer.text
    body = answer.json()
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == "file"
    assert body["total"] == len(body["errors"]) == 1
    assert body["errors"][0]["line"] == line
    if line is not None:
        assert body["error"]["message"].startswith(f"Line {line}: ")
    assert "Nothing was queued." in body["error"]["message"]
    if code:
        assert body["error"]["code"] == body["errors"][0]["code"] == code
    assert words in body["errors"][0]["message"]
    api.assert_nothing_left()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("CRLF", input_file(3).replace(b"\n", b"\r\n")),
        ("byte order mark", codecs.BOM_UTF8 + input_file(3)),
        ("blank lines", b"\n" + input_file(3).replace(b"\n", b"\n \t\n\r\n")),
        ("no last line feed", input_file(3)[:-1]),
        ("text of all the world", input_file(2) + request_line("zażółć 🦆 \u202e 你好")),
    ],
)
def test_forgiven_files(api: Api, name: str, content: bytes, model_first: bool) -> None:
    answer = api.submit(content, model_first=model_first)

    assert answer.status_code == 200, answer.text
    assert answer.json()["progress"]["total"] == 3


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_a_line_of_100_megabytes(api: Api, model_first: bool) -> None:
    def content() -> Iterator[bytes]:
        yield GOOD
        yield b'{"custom_id": "long", "body": {"messages": [{"role": "user", "content": "'
        for _ in range(100):
            yield b"x" * 1_000_000
        yield b'"}]}}\n'
        yield request_line("last")

    answer = api.submit(content(), model_first=model_first)

    assert answer.status_code == 400
    assert answer.json()["errors"][0]["line"] == 2
    assert "max_line_bytes" in answer.json()["error"]["message"]
    api.assert_nothing_left()


def test_utf_16(api: Api) -> None:
    answer = api.submit(GOOD.decode().encode("utf-16"))

    assert answer.status_code == 400
    assert "UTF-16. Save it as UTF-8." in answer.json()["error"]["message"]
    api.assert_nothing_left()


def test_many_bad_lines_are_counted_and_the_first_listed(api: Api) -> None:
    content = b"".join(
        b"{\n" if number % 2 else request_line(f"r{number}") for number in range(1000)
    )

    body = api.submit(content).json()

    assert body["total"] == 500
    assert [error["line"] for error in body["errors"]] == list(range(2, 201, 2))
    assert "500 errors" in body["error"]["message"]
    api.assert_nothing_left()


@pytest.mark.parametrize("model_first", [True, False], ids=["model first", "file first"])
def test_unknown_model(api: Api, model_first: bool) -> None:
    answer = api.submit(input_file(3), model="no/such-model", model_first=model_first)

    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "no/such-model" in error["message"]
    assert "google/gemma-3-4b-it" in error["message"]
    api.assert_nothing_left()


def test_too_many_requests(start_api: Callable[..., Api]) -> None:
    api = start_api(max_requests_per_batch=10)

    assert api.submit(input_file(10)).status_code == 200
    answer = api.submit(input_file(11))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many_tasks"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("status=odd", "status"),
        ("status=", "status"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=99999999999999999999", "limit"),
    ],
)
def test_bad_query(api: Api, query: str, param: str) -> None:
    answer = api.get(f"/v1/batches?{query}")

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_unknown_cursor(api: Api) -> None:
    for after in ("batch_000000000000000000000000", "nonsense"):
        answer = api.get(f"/v1/batches?after={after}")
        assert answer.status_code == 404
