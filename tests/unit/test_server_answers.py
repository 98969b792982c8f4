"""What a server's answer is taken for: any bytes, of any status, to any endpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.core import Endpoint
from batch_app.engine.server_answers import MAX_DEPTH, understood
from batch_app.engine.server_bodies import SHORTEST
from batch_app.engine.server_client import Answer, NoAnswer

CONTENT = {
    Endpoint.CHAT_COMPLETIONS: "choices",
    Endpoint.COMPLETIONS: "choices",
    Endpoint.RESPONSES: "output",
    Endpoint.EMBEDDINGS: "data",
    Endpoint.SCORE: "data",
    Endpoint.RERANK: "results",
}
ENDPOINTS = sorted(CONTENT)


def good(endpoint: str, **fields: Any) -> dict[str, Any]:
    return {"id": "x", CONTENT[Endpoint(endpoint)]: [{"index": 0}], **fields}


def read(endpoint: str, body: object, status: int = 200) -> Answer | NoAnswer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return understood(endpoint, Answer(status, raw, retry_after_s=7.0))


def why(endpoint: str, body: object, status: int = 200) -> str:
    found = read(endpoint, body, status)
    assert isinstance(found, NoAnswer)
    assert (found.code, found.is_final) == ("invalid_response", False)
    return found.why


def test_every_endpoint_is_known() -> None:
    assert ENDPOINTS == sorted(SHORTEST) == sorted(Endpoint)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("error", [None, "", {}, False])
def test_a_good_answer_stays_as_it_came(endpoint: str, error: object) -> None:
    body = json.dumps(good(endpoint, error=error, usage={"prompt_tokens": -35})).encode()
    assert read(endpoint, body) == Answer(200, body, 7.0)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "Busy.", "code": 429}, 429),
        ({"message": "Busy.", "code": "429"}, 429),
        ({"message": "Down.", "code": 503.0}, 503),
        ({"message": "Down.", "code": None, "status": 500}, 500),
        ({"message": "Busy.", "code": "rate_limit_exceeded"}, 429),
        ({"message": "Down.", "type": "server_error", "code": None}, 500),
        ({"message": "Bad.", "code": 422, "type": "server_error"}, 422),
        ({"message": "Bad.", "type": "invalid_request_error", "code": "x"}, 400),
        ({"message": "Odd.", "code": 200}, 400),
        ({"message": "Odd.", "code": True}, 400),
        ({"message": "Odd.", "code": 2**70}, 400),
        ({"message": "Odd.", "code": [429]}, 400),
        ("Unexpected endpoint or method.", 400),
        (["a", "list"], 400),
        (1, 400),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"id": "x"}, {"choices": None}, {"output": []}])
def test_an_error_in_a_200_is_an_error(
    endpoint: str, error: object, status: int, beside: dict[str, Any]
) -> None:
    body = json.dumps({**beside, "error": error}).encode()
    assert read(endpoint, body) == Answer(status, body, 7.0)


def test_an_error_without_a_field_of_its_own_is_one() -> None:
    body = json.dumps({"object": "error", "message": "No.", "code": 503}).encode()
    assert read(Endpoint.CHAT_COMPLETIONS, body) == Answer(503, body, 7.0)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_without_content_is_none(endpoint: str) -> None:
    name = CONTENT[Endpoint(endpoint)]
    assert f"has no `{name}`" in why(endpoint, {"id": "x"})
    assert f"has `{name}`: null" in why(endpoint, {name: None})
    assert f"a `{name}` that is no list" in why(endpoint, {name: "text"})
    if name != "output":
        assert f"has an empty `{name}`" in why(endpoint, {name: []})


def test_choices_are_objects() -> None:
    assert "no object" in why(Endpoint.COMPLETIONS, {"choices": [None]})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is empty"),
        (b'{"choices":[{"logprob":NaN}]}', "NaN"),
        (b'{"choices":[{"logprob":-Infinity,"text":"NaN"}]}', "Infinity"),
        (b'\xef\xbb\xbf{"choices":[{"text":"x"}]}', "byte order mark"),
        ('{"choices":[{"text":"x"}]}'.encode("utf-16"), "UTF-8"),
        (b'data: {"choices":[{"delta":{}}]}\n\ndata: [DONE]\n\n', "streams although"),
        (b": keep-alive\n\ndata: {}\n\n", "streams although"),
        (b"<html>NaN</html>", "HTML"),
        (b"[1]", "not an object"),
        (b"Service starting", "no JSON"),
        (b'{"choices":[{"text":"x', "cut off"),
        (b'{"choices":[1e400]}', "too large"),
        (b'{"choices":[' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"]}", "levels deep"),
        (b'{"a":' * 100_000, "no JSON"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, words: str) -> None:
    assert words in why(Endpoint.CHAT_COMPLETIONS, body)


@pytest.mark.parametrize(
    ("status", "words"), [(201, "answered 201"), (202, "answer it later"), (204, "sent no answer")]
)
def test_another_success_is_no_answer(status: int, words: str) -> None:
    assert words in why(Endpoint.CHAT_COMPLETIONS, good(Endpoint.CHAT_COMPLETIONS), status)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        (rb"\ud83d\ude00", rb"\ud83d\ude00"),
        (rb"a\ud83d", rb"a\ufffd"),
        (rb"\uDE00b", rb"\ufffdb"),
        (rb"\ud83d\ud83d\ude00\uDE00", rb"\ufffd\ud83d\ude00\ufffd"),
        (rb"\\ud83d \ud83d\n", rb"\\ud83d \ufffd\n"),
        (rb"\\\ud83d\u0041", rb"\\\ufffd\u0041"),
        (b"caf\xe9 \\ud83d", b"caf\xef\xbf\xbd \\ufffd"),
        (b"\xed\xa0\xbd", b"\xef\xbf\xbd" * 3),
    ],
)
@pytest.mark.parametrize("status", [200, 400])
def test_a_broken_character_costs_no_answer(text: bytes, becomes: bytes, status: int) -> None:
    body = b'{"choices": [{"text": "%b"}]}'
    assert read(Endpoint.COMPLETIONS, body % text, status) == Answer(status, body % becomes, 7.0)


def test_a_deep_answer_that_readers_can_read_is_kept() -> None:
    body = b'{"choices":[{"x":' + b"[" * (MAX_DEPTH - 3) + b"]" * (MAX_DEPTH - 3) + b"}]}"
    assert read(Endpoint.COMPLETIONS, body) == Answer(200, body, 7.0)


def test_brackets_in_text_are_no_depth() -> None:
    body = json.dumps(good(Endpoint.COMPLETIONS, text="[{" * 5_000)).encode()
    assert read(Endpoint.COMPLETIONS, body) == Answer(200, body, 7.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(2**70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
answers = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("choices", "data", "results", "output"), json_values),
        **dict.fromkeys(("error", "usage", "model", "object"), json_values),
    },
)


@given(
    st.sampled_from(ENDPOINTS),
    st.binary() | (answers | json_values).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([200, 201, 204, 302, 400, 401, 429, 500, 503, 599]) | st.integers(200, 999),
)
def test_any_answer_is_understood_as_something(endpoint: str, body: bytes, status: int) -> None:
    found = understood(endpoint, Answer(status, body))
    if isinstance(found, NoAnswer):
        assert 200 <= status < 300
        assert found.why.endswith(".")
        return
    assert b"\n" not in found.body
    assert b"\r" not in found.body
    value = json.loads(found.body)  # strictly UTF-8
    assert isinstance(value, dict)
    if found.status == 200:
        assert any(name in value for name in ("choices", "data", "results", "output", "scores"))
