"""What a request's body may say, and what is refused by name: docs/request_policy.md."""

from __future__ import annotations

import time
from typing import Any

import orjson
import pytest

from batch_app.config import load_settings
from batch_app.constraints import MAX_REGEX_UNFOLDED, unfolded_size
from batch_app.core import Endpoint
from batch_app.errors import ConfigError
from batch_app.lines import LineParser, LineProblem, RequestLine
from batch_app.policy import ALLOWED, REFUSED, check_body, check_template_arguments
from batch_app.shapes import BodyLimits, is_address

MESSAGES = [{"role": "user", "content": "hi"}]
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/score": {"data_1": "a", "data_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
}
CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, SCORE, RERANK = NEEDED
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def parse(url: str, limits: BodyLimits | None = None, /, **fields: Any) -> RequestLine:
    line = {"custom_id": "a", "url": url, "body": NEEDED[url] | fields}
    return LineParser(limits=limits).parse(orjson.dumps(line))


def refusal(url: str, limits: BodyLimits | None = None, /, **fields: Any) -> LineProblem:
    with pytest.raises(LineProblem) as caught:
        parse(url, limits, **fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith("body.")
    assert caught.value.message.endswith(".")
    assert len(caught.value.message) < 500
    return caught.value


def chat_part(**part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


def _parts(count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "a"}] * count}]


def _choices(*choices: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": choices}}


def function(parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def test_a_body_for_another_endpoint_is_told_where_it_belongs() -> None:
    def said(endpoint: str, body: dict[str, Any]) -> str:
        with pytest.raises(LineProblem) as problem:
            check_body(endpoint, body, BodyLimits())
        return problem.value.message

    chat, prompt = "/v1/chat/completions", {"prompt": "x"}
    hint = 'With "prompt", "url" is /v1/completions.'
    assert said(chat, prompt) == f'The body has no "messages". {hint}'
    assert said(chat, {"model": "m"}) == 'The body has no "messages".'
    messages = [{"role": "user", "content": "x"}]
    assert f'"url" is {chat}.' in said("/v1/completions", {"messages": messages})


def test_every_endpoint_has_a_list() -> None:
    assert set(ALLOWED) == {endpoint.value for endpoint in Endpoint} == set(NEEDED)


@pytest.mark.parametrize("url", NEEDED)
@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refused_in_every_body(url: str, field: str) -> None:
    assert field not in ALLOWED[url]
    problem = refusal(url, **{field: 1})
    assert problem.param == f"body.{field}"
    assert f'"{field}" is refused' in problem.message
    parse(url, **{field: None})  # says nothing, so it may be said


@pytest.mark.parametrize("url", NEEDED)
def test_denied_by_default(url: str) -> None:
    for field in ("a_field_of_tomorrow", "", "x" * 1000, "messages "):
        problem = refusal(url, **{field: None})
        assert "refused" in problem.message


#: The advisories' fields, as an attacker would write them: what the error's param must name.
ATTACKS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"chat_template": "{% for x in range(10**9) %}x{% endfor %}"}, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"chat_template": {"a": 1}}}, "chat_template_kwargs.chat_temp"),
    (
        CHAT,
        chat_part(type="image_url", image_url={"url": "http://169.254.169.254/latest"}),
        "messages[0].content[0].image_url.url",
    ),
    (
        CHAT,
        chat_part(type="image_url", image_url={"url": "file:///etc/passwd"}),
        "messages[0].content[0].image_url.url",
    ),
    (
        CHAT,
        chat_part(type="image_url", image_url={"url": "data:text/html,x"}),
        "messages[0].content[0].image_url.url",
    ),
    (CHAT, chat_part(type="video_url", video_url={"url": "http://a.b/"}), "messages[0].content[0]"),
    (CHAT, chat_part(type="video_url", video_url={"url": PIXEL}), "messages[0].content[0]"),
    (CHAT, chat_part(type="audio_url", audio_url={"url": PIXEL}), "messages[0].content[0]"),
    (CHAT, chat_part(type="input_audio", input_audio={"data": ""}), "messages[0].content[0]"),
    (CHAT, chat_part(type="image_embeds", image_embeds="x"), "messages[0].content[0]"),
    (CHAT, chat_part(type="prompt_embeds", data="x"), "messages[0].content[0]"),
    (CHAT, chat_part(type="file", file={"file_data": "x"}), "messages[0].content[0]"),
    (CHAT, chat_part(image_url="http://a.b/"), "messages[0].content[0]"),
    (
        CHAT,
        chat_part(type="image_url", image_url={"url": PIXEL}, uuid="x"),
        "messages[0].content[0].uuid",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "x", "file_url": "x"}]}, "messages[0].file"),
    (CHAT, {"media_io_kwargs": {"video": {"num_frames": 10**9}}}, "media_io_kwargs"),
    (CHAT, {"mm_processor_kwargs": {"size": 10**9}}, "mm_processor_kwargs"),
    (CHAT, {"n": 16384}, "n"),
    (CHAT, {"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
    (CHAT, {"top_logprobs": 100_000}, "top_logprobs"),
    (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"logprobs": 100_000}, "logprobs"),
    (COMPLETIONS, {"prompt": [1, 2, 3]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [[1, 2], [3]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["x"] * 3000}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 100, "n": 100}, "n"),
    (COMPLETIONS, {"prompt_embeds": "gASV"}, "prompt_embeds"),
    (EMBEDDINGS, {"input": [[1, 2]]}, "input[0]"),
    (EMBEDDINGS, {"input": ["x"] * 3000}, "input"),
    (CHAT, {"structured_outputs": {"regex": "(((a{100}){100}){100}){100}"}}, "structured_outputs"),
    (CHAT, {"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs.regex"),
    (CHAT, {"structured_outputs": {"grammar": "a" * 70_000}}, "structured_outputs.grammar"),
    (CHAT, {"structured_outputs": {"_backend": "x"}}, "structured_outputs._backend"),
    (CHAT, {"structured_outputs": {"regex": "(a|a)*" * 300}}, "structured_outputs.regex"),
    (CHAT, {"structured_outputs": {"regex": "a{2,}" * 300}}, "structured_outputs.regex"),
    (CHAT, {"structured_outputs": {"grammar": 'root ::= ((("a"{99}){99}){99})'}}, "structured_out"),
    (
        CHAT,
        {"structured_outputs": {"grammar": 'root ::= ("a"|"a")*' * 300}},
        "structured_outputs.g",
    ),
    # A schema may come as a text, and is no other for that.
    (
        CHAT,
        {"structured_outputs": {"json": '{"pattern":"(a{500}){500}"}'}},
        "structured_outputs.js",
    ),
    (
        CHAT,
        {"structured_outputs": {"json": '{"$ref":"http://10.0.0.1/x"}'}},
        "structured_outputs.js",
    ),
    (CHAT, {"structured_outputs": {"json": '{"maxItems":1000000000}'}}, "structured_outputs.json"),
    (
        CHAT,
        {"structured_outputs": {"json": '{"items":' * 40 + "{}" + "}" * 40}},
        "structured_outpu",
    ),
    (CHAT, {"structured_outputs": {"json": "[" * 20_000}}, "structured_outputs.json"),
    (
        CHAT,
        {"structured_outputs": {"json": f'{{"title":"{"x" * 70_000}"}}'}},
        "structured_outputs.j",
    ),
    (CHAT, {"structured_outputs": {"json": '{"pattern":'}}, "structured_outputs.json"),
    (CHAT, {"structured_outputs": {"json": '"x"'}}, "structured_outputs.json"),
    (
        CHAT,
        {
            "structured_outputs": {
                "structural_tag": '{"format":{"type":"regex","pattern":"(a{500}){500}"}}'
            }
        },
        "structured_outputs.structural_tag.pattern",
    ),
    (
        CHAT,
        {"response_format": {"type": "structural_tag", "format": {"grammar": '("a"|"a")*' * 300}}},
        "response_format.format.grammar",
    ),
    (CHAT, function({"properties": {"a": {"pattern": "(a{500}){500}"}}}), "tools[0].function.para"),
    (CHAT, function({"properties": {"a": {"pattern": 5}}}), "tools[0].function.parameters.pattern"),
    (
        CHAT,
        function({"anyOf": [{}, {"pattern": "(a{500}){500}"}]}),
        "tools[0].function.parameters.",
    ),
    (CHAT, function({"allOf": [{"oneOf": [{"$ref": "file:///x"}]}]}), "tools[0].function.param"),
    (CHAT, function({"patternProperties": {"(a{500}){500}": {}}}), "tools[0].function.parameters"),
    (CHAT, function({"$ref": "http://10.0.0.1/schema"}), "tools[0].function.parameters.$ref"),
    (CHAT, function({"maxLength": 10**9}), "tools[0].function.parameters.maxLength"),
    (CHAT, function({"description": "x" * 70_000}), "tools[0].function.parameters"),
    (CHAT, function("x"), "tools[0].function.parameters"),
    (CHAT, {"tools": function({})["tools"] * 200}, "tools"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"stop": "x" * 300}, "stop"),
    (CHAT, {"stop": [5]}, "stop[0]"),
    (CHAT, {"max_tokens": 2**40}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 2**40}, "max_completion_tokens"),
    (CHAT, {"logit_bias": {str(n): 1 for n in range(2000)}}, "logit_bias"),
    (CHAT, {"store": True}, "store"),
    (CHAT, {"documents": [{"text": {"a": 1}}]}, "documents[0].text"),
    (CHAT, {"repetition_detection": {"max_pattern_size": 10**6}}, "repetition_detection.max_patt"),
    (RESPONSES, {"tools": [{"type": "mcp", "server_url": "http://10.0.0.1"}]}, "tools[0].type"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
    (RESPONSES, {"background": True}, "background"),
    (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    (
        RESPONSES,
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    (SCORE, {"data_1": [1, 2]}, "data_1[0]"),
    (
        SCORE,
        {"data_1": {"content": [{"type": "image_url", "image_url": "http://10.0.0.1/"}]}},
        "data_1.content[0].image_url",
    ),
    (RERANK, {"documents": ["x"] * 3000}, "documents"),
]


@pytest.mark.parametrize(("url", "fields", "param"), ATTACKS)
def test_attacks(url: str, fields: dict[str, Any], param: str) -> None:
    problem = refusal(url, **fields)
    assert problem.param is not None
    assert problem.param.startswith(f"body.{param}")


@pytest.mark.parametrize("depth", [33, 900, 5000])
def test_deep_schemas(depth: int) -> None:
    line = orjson.dumps({"custom_id": "a", "body": NEEDED[CHAT] | function({"a": "HERE"})})
    deep = b'{"items":' * depth + b"{}" + b"}" * depth
    with pytest.raises(LineProblem, match=r"nested|depth"):
        LineParser().parse(line.replace(b'"HERE"', deep))


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        (CHAT, {"n": 128, "logprobs": True, "top_logprobs": 20, "stop": ["x"] * 16, "seed": -1}),
        (CHAT, {"stream": None, "n": None, "tools": None, "response_format": None, "stop": None}),
        (CHAT, {"stream": False, "store": False, "user": "u", "metadata": {"k": "v"}}),
        (CHAT, {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True}),
        (CHAT, {"stop_token_ids": [1, 2], "min_tokens": 3, "logit_bias": {"5": -100}}),
        (CHAT, {"structured_outputs": {"choice": ["a", "b"]}, "reasoning_effort": "low"}),
        (CHAT, {"structured_outputs": {"regex": r"[a-z]{1,64}@[a-z]{1,255}\.(com|org){1,2}"}}),
        (CHAT, {"structured_outputs": {"regex": r"[*+]{9}(\*|\+){9}" * 90}}),
        (CHAT, {"structured_outputs": {"json": '{"type":"object","properties":{"a":{}}}'}}),
        (CHAT, {"structured_outputs": {"structural_tag": '{"structures":[],"triggers":["<f>"]}'}}),
        (CHAT, {"structured_outputs": {"grammar": 'root ::= "*" [a-z]+ "(" root? ")" | "{5}"'}}),
        (CHAT, function({"type": "object", "properties": {"pattern": {"type": "string"}}})),
        (CHAT, function({"properties": {"a": {"pattern": r"^\d{3}-\d{4}$", "$ref": "#/$defs/a"}}})),
        (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (
            CHAT,
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}},
                }
            },
        ),
        (CHAT, chat_part(type="image_url", image_url={"url": PIXEL, "detail": "low"})),
        (CHAT, chat_part(type="text", text="x")),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": "x", "name": "Ann"},
                    {
                        "role": "assistant",
                        "content": None,
                        "refusal": None,
                        "annotations": [],
                        "audio": None,
                        "function_call": None,
                        "reasoning_content": "so",
                        "tool_calls": [
                            {
                                "id": "c",
                                "type": "function",
                                "function": {"name": "f", "arguments": "{}"},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c", "content": "5"},
                ]
            },
        ),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "echo": True, "logprobs": 5, "suffix": None}),
        (EMBEDDINGS, {"input": ["a"] * 2048, "encoding_format": "base64", "dimensions": 64}),
        (
            RESPONSES,
            {
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "5"},
                    {"type": "reasoning", "id": "r", "summary": [], "content": None},
                    {
                        "type": "message",
                        "role": "assistant",
                        "id": "m",
                        "status": "completed",
                        "content": [
                            {
                                "type": "output_text",
                                "text": "x",
                                "annotations": [],
                                "logprobs": None,
                            }
                        ],
                    },
                ],
                "instructions": "Be brief.",
                "max_output_tokens": 5,
                "reasoning": {"effort": "low"},
                "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
                "store": False,
            },
        ),
        (SCORE, {"data_1": "a", "data_2": ["b", "c"]}),
        (RERANK, {"documents": ["a", "b"], "top_n": 1}),
    ],
)
def test_what_clients_send_is_allowed(url: str, fields: dict[str, Any]) -> None:
    assert parse(url, **fields).verdict.endpoint == url


def test_a_setting_moves_its_bound() -> None:
    settings = load_settings(
        max_n=2,
        max_logprobs=0,
        max_output_tokens=10,
        max_inputs=3,
        max_messages=2,
        max_stop=1,
        max_stop_chars=1,
        max_tools=1,
        max_schema_bytes=30,
        max_schema_depth=2,
        max_regex_chars=3,
        max_media_bytes=40,
    )
    limits = BodyLimits.of(settings)
    tool = function({})["tools"]
    schema = {"a": "x" * 8}
    for url, good, bad in [
        (CHAT, {"n": 2}, {"n": 3}),
        (CHAT, {"top_logprobs": 0}, {"top_logprobs": 1}),
        (CHAT, {"max_tokens": 10}, {"max_tokens": 11}),
        (RESPONSES, {"max_output_tokens": 10}, {"max_output_tokens": 11}),
        (EMBEDDINGS, {"input": ["x"] * 3}, {"input": ["x"] * 4}),
        (CHAT, {"messages": MESSAGES * 2}, {"messages": MESSAGES * 3}),
        (RESPONSES, {"input": MESSAGES * 2}, {"input": MESSAGES * 3}),
        (CHAT, _choices("a" * 26), _choices("a" * 27)),
        (COMPLETIONS, {"prompt": ["x"], "n": 2}, {"prompt": ["x", "x"], "n": 2}),
        (CHAT, {"stop": ["x"]}, {"stop": ["x", "y"]}),
        (CHAT, {"stop": "x"}, {"stop": "xy"}),
        (CHAT, {"tools": tool}, {"tools": tool * 2}),
        (CHAT, function(schema), function(schema | {"b": "x" * 8})),
        (CHAT, function({"a": {}}), function({"a": {"b": {}}})),
        (
            CHAT,
            {"structured_outputs": {"regex": "abc"}},
            {"structured_outputs": {"regex": "abcd"}},
        ),
        (
            CHAT,
            chat_part(type="image_url", image_url=PIXEL),
            chat_part(type="image_url", image_url=PIXEL + "A" * 10),
        ),
    ]:
        parse(url, limits, **good)
        parse(url, **bad)
        assert "max_" in refusal(url, limits, **bad).message


def test_choices_and_tools_are_bounded_together() -> None:
    """vLLM compiles them as one grammar, beside the work of every other request."""
    parse(CHAT, **_choices(*["a" * 512] * 100))
    assert "512 characters" in refusal(CHAT, **_choices("a" * 513)).message
    assert "max_schema_bytes" in refusal(CHAT, **_choices(*["a" * 512] * 128)).message
    assert "at least 1" in refusal(CHAT, **_choices()).message

    tool = function({"description": "x" * 60_000})["tools"]
    parse(CHAT, tools=tool * 4)
    assert "4 times max_schema_bytes" in refusal(CHAT, tools=tool * 5).message
    response_tool = [{"type": "function", "name": "f", "parameters": {"description": "x" * 60_000}}]
    parse(RESPONSES, tools=response_tool * 4)
    assert "max_schema_bytes" in refusal(RESPONSES, tools=response_tool * 5).message

    assert "1024 entries" in refusal(CHAT, messages=_parts(1025)).message
    parse(CHAT, messages=_parts(1024))

    def tags(count: int) -> dict[str, Any]:
        tag = {"begin": "<a>", "end": "</a>", "schema": {"description": "x" * 30_000}}
        return {"response_format": {"type": "structural_tag", "structures": [tag] * count}}

    parse(CHAT, **tags(2))
    assert "max_schema_bytes" in refusal(CHAT, **tags(3)).message


@pytest.mark.parametrize("spaced", [False, True])
def test_too_many_messages_are_found_in_lines_that_are_alike(spaced: bool) -> None:
    parser = LineParser(limits=BodyLimits(max_messages=4))

    def line(name: str, count: int) -> bytes:
        body = {"messages": MESSAGES * count, "max_tokens": 4}
        raw = orjson.dumps({"custom_id": name, "body": body})
        return raw.replace(b":", b": ") if spaced else raw

    for number in range(4):
        parser.parse(line(f"a{number}", number + 1))
    with pytest.raises(LineProblem, match="max_messages"):
        parser.parse(line("b", 5))


class TestMedia:
    LIMITS = BodyLimits(media_domains=frozenset({"images.example.com", "127.0.0.1"}))

    @pytest.mark.parametrize(
        "url",
        ["https://images.example.com/a.png?x=1#y", "http://IMAGES.example.com/a", PIXEL],
    )
    def test_named_hosts(self, url: str) -> None:
        parse(CHAT, self.LIMITS, **chat_part(type="image_url", image_url={"url": url}))

    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com/a",
            "https://images.example.com.evil.org/a",
            "https://evil.org/images.example.com",
            "https://images.example.com@evil.org/",
            "https://evil.org\\@images.example.com/",
            "https://images.example.com\\.evil.org/",
            "https://evil.org#@images.example.com/",
            "https://images.example.com:8080/a",
            "https://images.example.com:x/a",
            "https://images.example.com./a",
            "ftp://images.example.com/a",
            "file:///etc/passwd",
            "file://images.example.com/etc/passwd",
            "//images.example.com/a",
            "images.example.com/a",
            "https://127.0.0.1/a",
            "https://[::1]/a",
            "https://[::1/a",
            "https://images.example.com\n.evil.org/a",
            "https://images.example.com\t/a",
            " https://images.example.com/a",
            "https://images.exämple.com/a",
            "",
        ],
    )
    def test_everything_else(self, url: str) -> None:
        refusal(CHAT, self.LIMITS, **chat_part(type="image_url", image_url={"url": url}))

    @pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "::1", "1.2.0x4"])
    def test_addresses(self, host: str) -> None:
        assert is_address(host)

    @pytest.mark.parametrize(
        "hosts", ["10.0.0.1", "localhost", "a.localhost", "[::1]", "UPPER.com", "*.com", "0x7f.0x1"]
    )
    def test_what_the_operator_cannot_name(self, hosts: str) -> None:
        with pytest.raises(ConfigError, match="public host"):
            load_settings(media_domains=hosts)

    def test_what_the_operator_can_name(self) -> None:
        settings = load_settings(media_domains="a.example.com,b-c.example.org")
        assert settings.media_domains == ("a.example.com", "b-c.example.org")


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("a{2,}", 2),
        ("(ab){3}", 6),
        ("((a{10}){10}){10}", 1000),
        ("[a-z{]{5}", 5),
        (r"[\]]{4}", 4),
        (r"\({3}", 3),
        ("a{,7}", 7),
        ("(a|b)*", 2),
        ("{", 1),
        ("a{x}", 4),
        ("(((", 0),
        (")", 1),
        ("[a", 1),
        ("\\", 1),
        ("(a{9}", 9),
    ],
)
def test_unfolded_size(pattern: str, size: int) -> None:
    assert unfolded_size(pattern) == size


def test_unfolding_itself_is_cheap() -> None:
    """However the expression is written: the check must not be the way in."""
    started = time.process_time()
    for pattern in ("(" * 4096, "{" * 4096, "[" * 4096, "a{9}" * 1024, "(a{" + "9" * 4000 + "})"):
        unfolded_size(pattern)
    assert unfolded_size("(" * 1000 + "a" + "){99}" * 600) > MAX_REGEX_UNFOLDED
    assert time.process_time() - started < 2


def test_template_arguments() -> None:
    line = parse(CHAT, chat_template_kwargs={"enable_thinking": False})
    assert line.verdict.template_arguments == ("enable_thinking",)
    check_template_arguments(line.verdict.template_arguments, ("enable_thinking",))
    with pytest.raises(LineProblem, match="enable_thinking is refused"):
        check_template_arguments(line.verdict.template_arguments, ())


def test_no_text_of_the_sender_in_an_error() -> None:
    """Errors reach logs and other people's eyes: they name fields, never values."""
    for url, fields in [
        (CHAT, {"temperature": "SECRET"}),
        (CHAT, {"stop": ["SECRET" * 100]}),
        (CHAT, {"messages": [{"role": "user", "content": {"a": "SECRET"}}]}),
        (CHAT, chat_part(type="SECRET")),
        (CHAT, chat_part(type="image_url", image_url="https://SECRET/")),
        (COMPLETIONS, {"prompt": [["SECRET"]]}),
        (CHAT, {"reasoning_effort": "SECRET" * 10}),
        (CHAT, {"truncation_side": "SECRET"}),
    ]:
        assert "SECRET" not in refusal(url, **fields).message
