"""Lines that every reader splits at the same places, and the one meaning of "failed"."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import orjson
import pytest

from batch_app.audit import AuditLog, Deed
from batch_app.cli.terminal import show_json
from batch_app.client.results import result_of
from batch_app.client.source import Source
from batch_app.core import Endpoint, TokenCounts
from batch_app.dashboard.events import event
from batch_app.engine.server_answers import understood
from batch_app.engine.server_client import Answer, NoAnswer
from batch_app.json_lines import escape_line_separators
from batch_app.logs import JsonFormatter
from batch_app.results import ResultsLog
from batch_app.retry import failed_lines
from batch_app.routes.downloads import ResultFilter, in_blocks, selected
from batch_app.wire.lines import as_run_batch, error_line, has_failed, response_line

BATCH = "batch_" + "0" * 24
#: All at which `str.splitlines()` splits, and so `iter_lines()` of httpx and of the OpenAI SDK.
SEPARATORS = [chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) > 1]
#: What looks alike in UTF-8: their neighbours, and characters that share their last bytes.
LOOKALIKES = "\u2027\u202a\u2068\u00a8\u00c5\u4e85\u4ea8\u00e2\u00c2…—“”"
NASTY = "".join(f"word{separator}" for separator in SEPARATORS) + LOOKALIKES


def is_one_line(text: str | bytes) -> bool:
    text = text if isinstance(text, str) else text.decode()
    return len(text.splitlines()) == 1 and len(text.split("\n")) <= 2


def raw_json(value: object) -> bytes:
    """JSON as vLLM and most servers write it: nothing is escaped that need not be."""
    return json.dumps(value, ensure_ascii=False).encode()


def test_the_separators_are_those_that_are_known() -> None:
    assert {"\u0085", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\r", "\n"} < set(SEPARATORS)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_a_separator_is_escaped_and_means_the_same(separator: str) -> None:
    value = {f"key{separator}": [f"{separator}one{separator}{separator}two\\{separator}"]}
    line = escape_line_separators(raw_json(value))
    assert is_one_line(line)
    assert json.loads(line) == value == orjson.loads(line)


@pytest.mark.parametrize("text", ["", "plain", LOOKALIKES, LOOKALIKES * 5000])
def test_without_separators_nothing_changes(text: str) -> None:
    line = raw_json({"text": text})
    assert escape_line_separators(line) is line


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_it_is_found_wherever_it_stands(separator: str) -> None:
    for before in (0, 1, 7, 4000):
        for after in (0, 1, 9, 5000):
            line = raw_json(f"{LOOKALIKES * before}{separator}{LOOKALIKES * after}")
            assert is_one_line(escape_line_separators(line))


def test_lines_of_results_are_one_line() -> None:
    body = raw_json({"text": NASTY})
    answer = response_line(BATCH, 0, NASTY, 200, body)
    refusal = response_line(BATCH, 1, NASTY, 400, raw_json({"error": {"message": NASTY}}))
    error = error_line(BATCH, 2, NASTY, "code", NASTY)
    for line in (answer, refusal, error):
        assert is_one_line(line)
        assert orjson.loads(line)["custom_id"] == NASTY
        # It decodes ids and encodes them again.
        assert is_one_line(as_run_batch(line))
        assert orjson.loads(as_run_batch(line))["custom_id"] == NASTY
    assert orjson.loads(answer)["response"]["body"] == {"text": NASTY}


def test_what_was_written_before_is_escaped_on_its_way_to_a_client() -> None:
    old = raw_json({"custom_id": NASTY, "response": {"status_code": 200}, "error": None})
    (block,) = in_blocks(selected([old, old], ResultFilter.COMPLETED))
    assert len(block.decode().splitlines()) == 2


def test_requests_that_we_write_are_one_line(tmp_path: Path) -> None:
    request = {"custom_id": "a", "body": {"prompt": NASTY}}
    with Source.of([request, request]) as source:
        lines = list(source.lines())
    assert [orjson.loads(line) for line in lines] == [request, request]
    assert all(map(is_one_line, lines))
    inputs, results = tmp_path / "in.jsonl", tmp_path / "results.jsonl"
    inputs.write_bytes(raw_json(request) + b"\r\n")
    results.write_bytes(error_line(BATCH, 0, "a", "code", "No.") + b"\n")
    (again,) = failed_lines(inputs, results)
    assert is_one_line(again)
    assert orjson.loads(again) == request


def test_other_lines_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("a", logging.INFO, "a", 1, "%s\udcff", (NASTY,), None)
    assert is_one_line(JsonFormatter().format(record))
    assert json.loads(JsonFormatter().format(record))["message"] == f"{NASTY}\udcff"
    head, data = event("batch", {"name": NASTY}).decode().rstrip("\n").split("\n")
    assert head == "event: batch"
    assert is_one_line(data)
    show_json({"name": NASTY}, compact=True)
    assert is_one_line(capsys.readouterr().out)
    log = AuditLog(tmp_path / "audit.jsonl", 1 << 20)
    log.write(Deed("delete", NASTY, 200))
    assert is_one_line((tmp_path / "audit.jsonl").read_bytes())


@pytest.mark.parametrize("separator", [each for each in SEPARATORS if each < " "])
def test_a_servers_answer_with_a_raw_control_character_is_no_answer(separator: str) -> None:
    """In a string, where JSON forbids it; between the parts, line ends become blanks."""
    path = Endpoint.COMPLETIONS
    inside = Answer(200, b'{"choices": [{"text": "a%bb"}]}' % separator.encode(), None)
    assert isinstance(understood(path, inside), NoAnswer)
    between = understood(path, Answer(200, b'{"choices":%b[{}]}' % separator.encode(), None))
    if separator in "\r\n":
        assert isinstance(between, Answer)
        assert is_one_line(between.body)
    else:
        assert isinstance(between, NoAnswer)


#: What a server may answer: 3xx and other 2xx, too.
STATUSES = [200, 201, 204, 299, 302, 304, 307, 399, 400, 404, 429, 500, 503, 599]


@pytest.mark.parametrize("status", STATUSES)
def test_failed_means_the_same_everywhere(tmp_path: Path, status: int) -> None:
    body: dict[str, Any] = {"error": {"message": "Moved.", "code": status}}
    line = response_line(BATCH, 0, "a", status, orjson.dumps(body))
    log = ResultsLog(tmp_path, 1, 1)
    log.append(0, status, TokenCounts(), line)
    is_failed = log.commit().failed == 1
    log.close()
    assert is_failed == (status != 200)
    inputs, results = tmp_path / "in.jsonl", tmp_path / "results.jsonl"
    inputs.write_bytes(b'{"custom_id": "a"}\n')
    results.write_bytes(line + b"\n")
    said = {
        "of a line": has_failed(line),
        "?status=failed": list(selected([line], ResultFilter.FAILED)) == [line],
        "?status=completed": list(selected([line], ResultFilter.COMPLETED)) == [],
        "of a retry": list(failed_lines(inputs, results)) == [b'{"custom_id": "a"}\n'],
        "of the client": not result_of(line).ok,
        "of vllm-batch run": orjson.loads(as_run_batch(line))["error"] is not None,
    }
    assert set(said.values()) == {is_failed}, said


def test_a_request_without_a_response_has_failed() -> None:
    line = error_line(BATCH, 0, "a", "batch_cancelled", "It did not run.")
    assert has_failed(line)
    assert not result_of(line).ok
