"""Why a model ended its answers: read from every kind of body, and told in every table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_app.cli.figures import ending, share
from batch_app.client.answers import write_answers
from batch_app.client.results import Result, result_of
from batch_app.client.states import Batch, batch_of
from batch_app.core import FinishReason, TokenCounts
from batch_app.engine.base import Outcome
from batch_app.engine.channel import Finished, from_engine_decoder
from batch_app.engine.usage import read_answer

USAGE = {"prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63}


def body(*reasons: object, **more: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion",
        "choices": [
            {"index": n, "message": {"content": '{"a": '}, "finish_reason": reason}
            for n, reason in enumerate(reasons)
        ],
        "usage": USAGE,
        **more,
    }


def response(status: str, reason: str | None = None) -> dict[str, Any]:
    details = {"reason": reason} if reason else None
    return {"object": "response", "status": status, "incomplete_details": details, "output": []}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (body("stop"), FinishReason.STOP),
        (body("length"), FinishReason.LENGTH),
        (body("tool_calls"), FinishReason.TOOL_CALLS),
        (body("function_call"), FinishReason.TOOL_CALLS),
        (body("content_filter"), FinishReason.CONTENT_FILTER),
        (body("abort"), FinishReason.OTHER),
        (body("model_length"), FinishReason.LENGTH),
        (body("stop", "stop", "length"), FinishReason.LENGTH),
        (body("length", "content_filter"), FinishReason.LENGTH),
        (body("stop", "tool_calls"), FinishReason.TOOL_CALLS),
        (body("stop", None), FinishReason.STOP),
        (body(None), None),
        (body(""), None),
        (body(), None),
        ({"object": "list", "data": [{"embedding": [0.5]}], "usage": USAGE}, None),
        ({"object": "list", "status": "completed"}, None),
        (response("completed"), FinishReason.STOP),
        (response("incomplete", "max_output_tokens"), FinishReason.LENGTH),
        (response("incomplete", "content_filter"), FinishReason.CONTENT_FILTER),
        (response("incomplete"), FinishReason.OTHER),
        (response("failed"), FinishReason.OTHER),
    ],
)
def test_a_body_says_why_it_ended(answer: dict[str, Any], reason: FinishReason | None) -> None:
    facts = read_answer(json.dumps(answer).encode())
    assert facts.finish_reason is reason
    assert facts.tokens == (TokenCounts(3, 60) if "usage" in answer else TokenCounts())


@pytest.mark.parametrize("odd", [None, 7, -1.5, "x", [], [7], {}, {"a": []}, [[{}]], True])
def test_one_odd_field_leaves_the_others(odd: object) -> None:
    cut_off = body("length")
    for name in ("object", "status", "incomplete_details"):
        facts = read_answer(json.dumps(cut_off | {name: odd}).encode())
        assert (facts.finish_reason, facts.tokens) == (FinishReason.LENGTH, TokenCounts(3, 60))
    assert read_answer(json.dumps(cut_off | {"choices": odd}).encode()).tokens.prompt_tokens == 3
    facts = read_answer(json.dumps(cut_off | {"usage": odd}).encode())
    assert (facts.finish_reason, facts.tokens) == (FinishReason.LENGTH, TokenCounts())
    strange = body(odd)
    assert read_answer(json.dumps(strange).encode()).tokens.prompt_tokens == 3
    assert read_answer(json.dumps(odd).encode()).finish_reason is None


def test_it_crosses_the_process_boundary() -> None:
    outcomes = [
        Outcome(number, 200, b"{}", finish_reason=reason)
        for number, reason in enumerate([None, *FinishReason])
    ]
    message = from_engine_decoder.decode(msgspec.msgpack.encode(Finished(outcomes)))
    assert message == Finished(outcomes)


# -- what a client sees --------------------------------------------------------------------------


def batch(**progress: Any) -> Batch:
    counts = {"total": 3000, "completed": 3000, "failed": 0, "percent": 100.0} | progress
    unset = dict.fromkeys(
        ("started_at", "completed_at", "throughput_tokens_per_sec", "error_message")
    )
    return batch_of(
        {
            "batch_id": "batch_1",
            "model": "sim",
            "status": "completed",
            "created_at": "2026-01-01T12:00:00",
            "progress": counts,
            "finish_reasons": {"length": 3000},
        }
        | unset
    )


def test_a_person_is_told_what_was_cut_off() -> None:
    cut_off = batch(truncated=3000)
    assert cut_off.progress.truncated == cut_off.finish_reasons["length"] == 3000
    assert ending(cut_off).endswith("3,000 answered, 3,000 cut off at max_tokens")
    assert share(cut_off) == "3,000 of 3,000 done (100.0%), 3,000 cut off at max_tokens"
    both = batch(completed=2998, failed=2, truncated=12)
    assert ending(both).endswith("2,998 answered, 2 failed, 12 cut off at max_tokens")
    # A server that doesn't count them.
    assert "cut off" not in ending(batch())


def result(answer: dict[str, Any], asked: dict[str, Any] | None = None) -> Result:
    line = {"custom_id": "a", "response": {"status_code": 200, "body": answer}, "error": None}
    request = None if asked is None else {"custom_id": "a", "body": asked}
    return result_of(json.dumps(line).encode(), request)


@pytest.mark.parametrize(
    ("answer", "asked", "cut_off"),
    [
        (body("length"), None, " (cut off at max_tokens=60)"),
        (body("stop"), None, ""),
        (body("length"), {"max_tokens": 99}, " (cut off at max_tokens=99)"),
        (body("length", "stop"), None, " (cut off at max_tokens)"),
        (body("length", usage=None), None, " (cut off at max_tokens)"),
        (
            response("incomplete", "max_output_tokens") | {"max_output_tokens": 16},
            None,
            " (cut off at max_tokens=16)",
        ),
    ],
)
def test_an_answer_that_is_not_json_says_that_it_was_cut_off(
    tmp_path: Path, answer: dict[str, Any], asked: dict[str, Any] | None, cut_off: str
) -> None:
    target = tmp_path / "out.csv"
    written = write_answers(target, lambda: iter([result(answer, asked)]), parse_json=True)
    (row,) = csv.DictReader(target.read_text().splitlines())
    assert row["error"] == f"the answer is not a JSON object{cut_off}"
    assert (written.num_unparsed, written.num_truncated) == (1, int(bool(cut_off)))
