"""One line: what passes, what comes of it, and that nothing but LineProblem is ever raised."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.lines import LineProblem, parse_line

MESSAGES = [{"role": "user", "content": "hi"}]


def raw(**fields: Any) -> bytes:
    return orjson.dumps({"custom_id": "a", "body": {"messages": MESSAGES}} | fields)


def body(**fields: Any) -> bytes:
    return raw(body={"messages": MESSAGES} | fields)


def test_defaults() -> None:
    line = parse_line(raw())
    assert line.custom_id == "a"
    assert line.verdict.endpoint == "/v1/chat/completions"
    assert line.verdict.model is None
    assert line.verdict.max_tokens == 0
    assert orjson.loads(line.body) == {"messages": MESSAGES}
    assert (line.verdict.head, line.stream) == (b"", orjson.dumps(MESSAGES))


def test_what_the_planner_needs_is_read() -> None:
    line = parse_line(body(model="m", max_tokens=7))
    assert (line.verdict.model, line.verdict.max_tokens) == ("m", 7)
    assert parse_line(body(max_tokens=7, max_completion_tokens=9)).verdict.max_tokens == 9


@pytest.mark.parametrize(
    "line",
    [
        body(temperature=0),
        body(temperature=1.5, top_p=1, seed=-5, stop=["x"], n=2),
        body(stream=False, logprobs=True, tools=[]),
        body(temperature=None, max_tokens=None, model=None),
        raw(method="POST", url="/v1/chat/completions", extra=1),
        raw(url="/v1/completions", body={"prompt": "x"}),
        raw(url="/v1/embeddings", body={"input": ["x", "y"]}),
        raw(url="/v1/rerank", body={"query": "x", "documents": ["y"]}),
        raw(custom_id="x" * 512),
        raw(custom_id="\u0000 \u202e"),
        raw() + b" \r",
    ],
)
def test_accepted(line: bytes) -> None:
    parse_line(line)


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"", "invalid_json_line", None),
        (b"nul", "invalid_json_line", None),
        (b'"text"', "invalid_json_line", None),
        (b"{}{}", "invalid_json_line", None),
        (raw(custom_id=None), "missing_required_parameter", "custom_id"),
        (raw(custom_id=""), "invalid_request", "custom_id"),
        (raw(method="post"), "invalid_method", "method"),
        (raw(url="/v1/chat/completions/"), "invalid_request", "url"),
        (raw(url={}), "invalid_request", "url"),
        (raw(body=None), "missing_required_parameter", "body"),
        (raw(body="text"), "invalid_request", "body"),
        (raw(body={}), "missing_required_parameter", "body.messages"),
        (raw(body={"messages": []}), "invalid_request", "body.messages"),
        (raw(body={"messages": [1]}), "invalid_request", "body.messages[0]"),
        (raw(body={"messages": [{"role": 1}]}), "invalid_request", "body.messages[0].role"),
        (raw(url="/v1/completions"), "missing_required_parameter", "body.prompt"),
        (body(an_unknown_field={"deep": [1]}), "invalid_request", "body.an_unknown_field"),
        (body(stream=True), "invalid_request", "body.stream"),
        (body(stream="yes"), "invalid_request", "body.stream"),
        (body(temperature="1"), "invalid_request", "body.temperature"),
        (body(temperature=True), "invalid_request", "body.temperature"),
        (body(max_tokens=1.5), "invalid_request", "body.max_tokens"),
        (body(max_tokens=2**63), "invalid_request", "body.max_tokens"),
        (body(ignore_eos=1), "invalid_request", "body.ignore_eos"),
        (body(model=["m"]), "invalid_request", "body.model"),
    ],
)
def test_refused(line: bytes, code: str, param: str | None) -> None:
    with pytest.raises(LineProblem) as caught:
        parse_line(line)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.message[-1] in ".?"


@given(st.binary(max_size=300))
def test_any_bytes(line: bytes) -> None:
    """Nothing but LineProblem comes out, whatever goes in."""
    with suppress(LineProblem):
        parse_line(line)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ("messages", "temperature", "max_tokens", "stream", "model", "n", "prompt", "input")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "custom_id": _JSON,
            "method": _JSON | st.just("POST"),
            "url": _JSON | st.sampled_from(["/v1/chat/completions", "/v1/embeddings"]),
            "body": _JSON | st.dictionaries(st.sampled_from(_FIELDS), _JSON),
        },
    )
)
def test_any_json(line: dict[str, Any]) -> None:
    try:
        request = parse_line(orjson.dumps(line))
    except (LineProblem, TypeError, orjson.JSONEncodeError):
        return  # what orjson can't even write can't be a line
    assert request.custom_id == line["custom_id"]
    assert orjson.loads(request.body) == line["body"]
