"""Which constraints are tried in a separate process before the engine compiles them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from batch_app.engine.vllm_grammars import PLAIN_BYTES, constraint_bytes, may_be_slow


def is_tried(**fields: Any) -> bool:
    names = ("json", "regex", "choice", "grammar", "structural_tag", "whitespace_pattern")
    constraint = SimpleNamespace(**dict.fromkeys(names) | fields)
    return may_be_slow(constraint, constraint_bytes(constraint))


def person(**name: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"name": {"type": "string"} | name}}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("schema", "tried"),
    [
        (person(), False),
        (person(maxLength=80), False),
        (person(maxLength=100), True),
        (person(minLength=2000), True),
        (person(pattern="^a+$"), True),
        (person(anyOf=[{"type": "null"}]), True),
        ({"$ref": "#/$defs/a", "$defs": {"a": person()}}, True),
        (person(description="x" * PLAIN_BYTES), True),
    ],
)
def test_schemas(schema: dict[str, Any], tried: bool, as_text: bool) -> None:
    assert is_tried(json=json.dumps(schema) if as_text else schema) is tried


def test_the_others() -> None:
    assert is_tried(grammar='root ::= "a"')
    assert is_tried(regex="a|b")
    assert not is_tried(choice=["yes", "no"])
    assert is_tried(choice=["a" * 500] * 10)
    assert is_tried(structural_tag=json.dumps({"structures": [{"schema": person(pattern="a")}]}))
