"""The shorter ways take nothing that the plain way refuses, and make the same of it."""

from __future__ import annotations

import json
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app import lines
from batch_app.lines import LineParser, LineProblem, RequestLine

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'a "b"', "parameters": {}}}]


def plain(raw: bytes, only_endpoint: str | None = None) -> RequestLine | None:
    try:
        return LineParser(only_endpoint).parse_plain(raw)
    except LineProblem:
        return None


def assert_agreement(parser: LineParser, raw: bytes) -> None:
    for way in (parser.parse_alike, parser.parse_short):
        short = way(raw)
        if short is not None:
            assert short == plain(raw)


def usual(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"custom_id": "r1", "method": "POST", "url": CHAT, "body": body} | fields


USUAL: dict[str, dict[str, Any]] = {
    "chat": usual({"model": "m", "messages": MESSAGES, "max_tokens": 9, "temperature": 0}),
    "only what is needed": {"custom_id": "r", "body": {"messages": MESSAGES}},
    "messages last": usual({"temperature": 0.5, "stop": ["\n", '"]'], "messages": MESSAGES}),
    "stop after messages": usual({"messages": MESSAGES, "stop": ["\n", "x"]}),
    "tools after messages": usual({"messages": MESSAGES, "tools": TOOLS, "seed": 7}),
    "text parts": usual(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}
    ),
    "quotes and brackets": usual({"messages": [{"role": "user", "content": 'a}], "b"]\\'}]}),
    "all the world": usual({"messages": [{"role": "user", "content": "zażółć 🦆 你好"}]}),
    "schema": usual(
        {
            "messages": MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "object"}},
            },
        }
    ),
    "completion": usual({"prompt": 'say "x"\\', "max_tokens": 5}, url="/v1/completions"),
    "embedding": usual({"input": "text", "model": "m"}, url="/v1/embeddings"),
    "embeddings": usual({"input": ["a", "b]"], "model": "m"}, url="/v1/embeddings"),
    "response": usual({"input": "text", "instructions": "Be brief."}, url="/v1/responses"),
    "response to items": usual({"input": MESSAGES, "seed": 1}, url="/v1/responses"),
}


@pytest.mark.parametrize("name", USUAL)
def test_usual_lines_go_the_short_way(name: str) -> None:
    line = USUAL[name]
    for raw in (
        orjson.dumps(line),
        json.dumps(line).encode(),
        json.dumps(line, ensure_ascii=False).encode(),
        json.dumps(line, sort_keys=True).encode(),
        orjson.dumps(line) + b"\r",
    ):
        parser = LineParser()
        for _ in range(2):  # The second time the verdict is known.
            short = parser.parse_short(raw)
            assert short is not None, raw
            assert short == plain(raw)
            assert orjson.loads(short.body) == line["body"]
            assert short.body in raw


@pytest.mark.parametrize("name", USUAL)
def test_lines_that_are_alike_go_the_shortest_way(name: str) -> None:
    line = USUAL[name]
    for dumps in (orjson.dumps, lambda each: json.dumps(each).encode()):
        parser = LineParser()
        for custom_id in ("r1", "r2"):
            parser.parse(dumps(line | {"custom_id": custom_id}))
        for custom_id in ("another", "ü", 'a "b"', "r" * 512, "r" * 513, ""):
            raw = dumps(line | {"custom_id": custom_id})
            alike = parser.parse_alike(raw)
            assert_agreement(parser, raw)
            if custom_id == "another":
                assert alike is not None


# A line with two places in it: for the text of the id, and for the value of the prompt.
_LAYOUTS = (
    b'{"custom_id":"%b","body":{"messages":%b,"seed":1}}',
    b'{"custom_id": "%b", "url": "/v1/completions", "body": {"prompt": %b, "seed": 1}}',
    b'{"custom_id":"x","custom_id":"%b","body":{"messages":%b}}',
    b'{"custom_id":"%b","custom_id":"x","body":{"messages":%b}}',
    b'{"custom_id":"%b","custom_id":"r1","body":{"messages":%b}}',
    b'{"custom_id":"%b","method":"POST","body":{"user":"\\"custom_id\\":\\"","messages":%b}}',
    b'{"method":"POST","custom_id":"%b","body":{"messages":%b},"url":"/v1/chat/completions"}',
    b'{"body":{"messages":%b},"custom_id":"%b"}',
    b' {"custom_id" :"%b" ,"body" :{"messages" :%b}} ',
    b'{"custom_id":"%b","body":{"metadata":{"custom_id":"r1"},"messages":%b}}',
)
_ID_TEXTS = st.sampled_from(
    [b"r1", b"r2", b"", b"a\\", b'a\\"b', b"\\u0041", b"\xff", b"\x01", b'","x":"', b"r" * 513]
)
_PROMPT_TEXTS = st.sampled_from(
    [
        orjson.dumps(MESSAGES),
        b'"text"',
        b"[]",
        b"",
        b"null",
        b'"a\\"',
        b'[{"role":"user","content":"x"}],"messages":[]',
        b'[{"role":"user","content":"x","odd":1}]',
        b'[{"role":"user","content":"\xff"}]',
        b'[{"role":"user","content":"]}"}]',
    ]
)


@given(st.sampled_from(_LAYOUTS), st.lists(st.tuples(_ID_TEXTS, _PROMPT_TEXTS), max_size=4))
def test_all_ways_agree_on_lines_that_are_nearly_alike(
    layout: bytes, fillings: list[tuple[bytes, bytes]]
) -> None:
    parser = LineParser()
    first = (
        b'"text"' if b"completions" in layout and b"chat" not in layout else b'[{"role":"user"}]'
    )
    for custom_id, prompt in [(b"r1", first)] * 3 + fillings:
        in_order = (prompt, custom_id) if layout.startswith(b'{"body"') else (custom_id, prompt)
        assert_agreement(parser, layout % in_order)


def test_another_line_with_the_same_rest_is_still_judged() -> None:
    parser = LineParser()
    good = orjson.dumps(USUAL["chat"])
    assert parser.parse_short(good) is not None
    assert parser.parse_short(good.replace(b'"role":"user"', b'"rule":"user"')) is None
    assert parser.parse_short(good.replace(b"Hi", b"\xff\xfe")) is None
    assert parser.parse_short(good.replace(b"Hi", b"\\ud800")) is None
    assert parser.parse_short(good.replace(b"Hi", b"\n")) is None
    assert parser.parse_short(good.replace(b"temperature", b"priority")) is None


def test_the_hole_cannot_be_dug_by_the_sender() -> None:
    """Keys that look like the ones we search for, wherever else they can stand."""
    messages = orjson.dumps(MESSAGES)
    for raw in (
        b'{"custom_id":"a","body":{"metadata":{"messages":%b},"messages":1}}' % messages,
        b'{"custom_id":"a","body":{"messages":%b,"messages":1}}' % messages,
        b'{"custom_id":"a","body":{"messages":1,"messages":%b}}' % messages,
        b'{"custom_id":"a","body":{"messages":%b},"body":{}}' % messages,
        b'{"custom_id":"a","body":{},"body":{"messages":%b}}' % messages,
        b'{"body":{"messages":%b},"custom_id":"a","body":5}' % messages,
        b'{"custom_id":"\\"body\\":{","body":{"messages":%b}}' % messages,
        b'{"body":{"messages":%b,"priority":1},"custom_id":"a"}' % messages,
        b'{"custom_id":"a","body":{"m\\u0065ssages":5,"tools":[{"messages":%b}]}}' % messages,
        b'{"custom_id":"a","body":{"messages":%b}}}' % messages,
        b'{"custom_id":"a","body":{"messages":%b}}{}' % messages,
        b'{"custom_id":"a","body":{"messages":%b0}}' % messages,
        b'{"custom_id":"a","body":{"messages":5}}',
    ):
        parser = LineParser()
        parser.parse_short(orjson.dumps(USUAL["only what is needed"]))
        assert_agreement(parser, raw)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**63, -(2**63) - 1, 10**30, 1e308, 0.5, "x", [], ["x"], {}, {"a": 1}]),
)
_NAMES = (
    "temperature max_tokens n stop seed stream model logprobs top_logprobs tools user metadata "
    "response_format chat_template priority unknown prompt input messages max_output_tokens "
    "truncate_prompt_tokens encoding_format instructions echo tool_choice"
)
_FIELDS = st.dictionaries(
    st.sampled_from(_NAMES.split(" ")),
    _VALUES,
    max_size=4,
)
_TEXTS = st.text(max_size=12) | st.sampled_from(['}],"', '"messages":[', '{"body":{', "\\", '"]'])
_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "odd"])},
    optional={"text": _TEXTS, "image_url": _VALUES},
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", 5])},
        optional={
            "content": _TEXTS | _VALUES | st.lists(_PARTS, max_size=2),
            "name": _TEXTS | st.none(),
            "tool_calls": _VALUES
            | st.just(
                [{"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]
            ),
            "odd": st.just(1),
        },
    ),
    max_size=3,
)
_PROMPTS = st.one_of(_TEXTS, _MESSAGES, st.lists(_TEXTS, max_size=3), _VALUES)


@given(
    st.tuples(
        st.sampled_from(["messages", "prompt", "input"]),
        _PROMPTS,
        _FIELDS,
        _FIELDS,
        st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/odd"]),
        _TEXTS,
        st.booleans(),
        st.sampled_from(["", "sort", "spaces"]),
    )
)
def test_both_ways_agree(
    parts: tuple[str, Any, dict[str, Any], dict[str, Any], str, str, bool, str],
) -> None:
    field, prompt, before, after, url, custom_id, with_url, style = parts
    line = {"custom_id": custom_id, "body": {**before, field: prompt, **after}}
    if with_url:
        line["url"] = url
    parser = LineParser()
    parser.parse_short(orjson.dumps(USUAL["chat"]))
    raw = json.dumps(
        line,
        sort_keys=style == "sort",
        separators=(", ", ": ") if style == "spaces" else (",", ":"),
        ensure_ascii=len(custom_id) % 2 == 0,
    ).encode(errors="surrogatepass")
    for _ in range(2):
        assert_agreement(parser, raw)


@given(st.sampled_from(sorted(USUAL)), st.data())
def test_both_ways_agree_on_damaged_lines(name: str, data: st.DataObject) -> None:
    raw = bytearray(json.dumps(USUAL[name]).encode())
    parser = LineParser()
    parser.parse_short(bytes(raw))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        piece = data.draw(
            st.sampled_from(
                [b"", b'"', b"\\", b"{", b"}", b"]", b",", b"0", b"\x00", b"\xff", b" "]
            )
        )
        raw[at : at + data.draw(st.integers(0, 2))] = piece
        if not raw:
            return
    assert_agreement(parser, bytes(raw))


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_VERDICTS", 10)
    parser = LineParser()
    for number in range(100):
        assert parser.parse_short(orjson.dumps(usual({"messages": MESSAGES, "seed": number})))
        assert len(parser._verdicts) <= 10
    long = orjson.dumps(usual({"messages": MESSAGES, "user": "x" * lines.MAX_VERDICT_BYTES}))
    assert parser.parse_short(long) is not None
    assert sum(sys.getsizeof(rest) for _, rest in parser._verdicts) < lines.MAX_VERDICT_BYTES


class TestWhatThePlannerNeeds:
    @pytest.mark.parametrize(
        ("body", "deterministic"),
        [
            ({}, False),
            ({"temperature": 0}, True),
            ({"temperature": 0.0, "n": 1}, True),
            ({"temperature": 0, "n": 2}, False),
            ({"temperature": 1}, False),
            ({"seed": 0}, True),
            ({"seed": None}, False),
        ],
    )
    def test_deterministic(self, body: dict[str, Any], deterministic: bool) -> None:
        raw = orjson.dumps(usual({"messages": MESSAGES} | body))
        for line in (LineParser().parse(raw), plain(raw)):
            assert line is not None
            assert line.verdict.deterministic is deterministic

    def test_embeddings_are_deterministic(self) -> None:
        assert LineParser().parse(orjson.dumps(USUAL["embedding"])).verdict.deterministic

    def test_prompts(self) -> None:
        def prompt(url: str = CHAT, **body: Any) -> tuple[bytes, bytes]:
            line = LineParser().parse(orjson.dumps(usual(body, url=url)))
            return line.verdict.head, line.stream

        assert prompt(messages=MESSAGES, n=1) == (b"", orjson.dumps(MESSAGES))
        head, _ = prompt(messages=MESSAGES, tools=TOOLS, temperature=1)
        assert head == b'"tools":' + orjson.dumps(TOOLS)
        assert prompt("/v1/completions", prompt="x") == (b"", b'"x"')
        assert prompt("/v1/responses", input="x", instructions="y") == (
            b'"instructions":"y"',
            b'"x"',
        )
        assert prompt("/v1/rerank", query="q", documents=["d"]) == (b"", b'"q",["d"]')
        assert prompt("/v1/score", data_2="b", data_1="a") == (b"", b'"a","b"')

    def test_max_tokens_of_a_response(self) -> None:
        raw = orjson.dumps(usual({"input": "x", "max_output_tokens": 7}, url="/v1/responses"))
        assert LineParser().parse(raw).verdict.max_tokens == 7

    def test_url_of_the_batch(self) -> None:
        raw = orjson.dumps(USUAL["chat"])
        assert LineParser(CHAT).parse_short(raw) is not None
        assert LineParser("/v1/embeddings").parse_short(raw) is None
        with pytest.raises(LineProblem, match="the batch is for"):
            LineParser("/v1/embeddings").parse(raw)


@pytest.mark.parametrize("url", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 5},
        {"max_tokens": None, "seed": 3, "temperature": 0.7, "top_p": 1, "user": "u"},
        {"max_tokens": 5, "max_completion_tokens": 7},
        {"max_tokens": 2**30},
        {"max_tokens": 2**63},
        {"max_tokens": True},
        {"seed": 2**64},
        {"seed": 1.0},
        {"temperature": 0},
        {"temperature": "0"},
        {"stream": False},
        {"stream": True},
        {"stream": 0},
        {"user": 5},
        {"model": 5},
        {"messages": 5},
        {"prompt": 5},
        {"odd": 5},
    ],
)
def test_the_usual_fields_are_judged_alike(url: str, fields: dict[str, Any]) -> None:
    prompt = {"messages": MESSAGES} if url == CHAT else {"prompt": "x"}
    raw = json.dumps(usual(prompt | fields, url=url)).encode()
    assert LineParser().parse_short(raw) == plain(raw)
