"""The client's reading of results: servers answer anything, and the table still has every row."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.client.answers import write_answers
from batch_app.client.results import Result, result_of
from batch_app.wire.lines import response_line

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text()
values = st.recursive(
    leaves | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def objects(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of these fields, and sometimes something else altogether."""
    return st.fixed_dictionaries({}, optional=fields) | values


parts = objects(type=st.just("output_text"), text=values)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "object": st.just("response") | values,
        "choices": st.lists(
            objects(
                message=objects(content=values | st.just('{"a": 1}')),
                text=values,
                finish_reason=values,
            ),
            max_size=2,
        )
        | values,
        "output": st.lists(objects(type=st.just("message"), content=st.lists(parts, max_size=2)))
        | values,
        "data": st.lists(objects(embedding=values), max_size=2) | values,
        "usage": objects(prompt_tokens=values, completion_tokens=values),
        "error": objects(message=values, code=values, type=values),
    },
)


def result(body: object, status: int = 200, custom_id: str = "r0") -> Result:
    return result_of(response_line("batch_1", 0, custom_id, status, orjson.dumps(body)))


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("<think>so</think>\n4", 1),
        ("so</think>4", 1),  # the template opened it
        ("\n<think>cut off", 1),
        ("[THINK]so[/THINK]4", 1),
        ("A tag such as <think> in the middle", 0),
        ("4", 0),
        (None, 0),
    ],
)
def test_reasoning_in_answers_is_counted(tmp_path: Path, text: str | None, num: int) -> None:
    answer = result({"choices": [{"message": {"content": text}}]})
    assert write_answers(tmp_path / "out.csv", lambda: iter([answer])).num_reasoning == num


@given(bodies, st.sampled_from([200, 400, 500]))
def test_any_body_is_read(body: dict[str, Any], status: int) -> None:
    read = result(body, status)
    assert read.ok is (status == 200)
    assert read.text is None or isinstance(read.text, str)
    assert read.finish_reason is None or isinstance(read.finish_reason, str)
    for kind in ("prompt", "completion"):
        count = read.tokens(kind)
        assert count is None or 0 <= count < 2**63
    if read.error is not None:
        assert isinstance(read.error.code, str)
        assert read.error.message


@given(st.lists(st.tuples(bodies, st.sampled_from([200, 400])), max_size=6))
def test_any_bodies_become_a_table(
    tmp_path_factory: pytest.TempPathFactory, answered: list[tuple[dict[str, Any], int]]
) -> None:
    results = [result(body, status, f"r{n}") for n, (body, status) in enumerate(answered)]
    folder = tmp_path_factory.mktemp("tables")
    for kind in ("csv", "parquet"):
        target = folder / f"answers.{kind}"
        written = write_answers(target, lambda: iter(results), parse_json=True)
        assert written.num_rows == len(results)
    table = pyarrow.parquet.read_table(folder / "answers.parquet")
    assert table["custom_id"].to_pylist() == [one.custom_id for one in results]
    with (folder / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert [row["custom_id"] for row in csv.DictReader(file)] == [r.custom_id for r in results]


@pytest.mark.parametrize("depth", [100, 600, 1000])
def test_a_deep_answer_becomes_a_cell(tmp_path: Path, depth: int) -> None:
    text = '{"a":' + "[" * depth + "]" * depth + "}"
    body = {"choices": [{"message": {"content": text}}]}
    written = write_answers(tmp_path / "answers.csv", lambda: iter([result(body)]), parse_json=True)
    assert (written.num_rows, written.num_failed) == (1, 0)


def test_an_error_may_be_a_text() -> None:
    error = result({"error": "Unexpected endpoint."}, 400).error
    assert error is not None
    assert (error.code, error.message) == ("400", "Unexpected endpoint.")
