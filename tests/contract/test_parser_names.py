"""The parsers that `models add` proposes: the installed vLLM has every one of them."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from batch_app import parsers


def registered(package: str, variable: str) -> set[str]:
    """The names in a registry of the installed vLLM, read from its source: nothing is imported."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(spec.submodule_search_locations[0]) / package / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            (target,) = node.targets
            if isinstance(target, ast.Name) and target.id == variable:
                return {str(ast.literal_eval(key)) for key in node.value.keys if key is not None}
    raise AssertionError(f"{source} has no {variable}")


def test_every_proposed_tool_parser_exists() -> None:
    names = {rule.tool for rule in parsers.RULES if rule.tool}
    assert len(names) > 20
    assert names - registered("tool_parsers", "_TOOL_PARSERS_TO_REGISTER") == set()


def test_every_proposed_reasoning_parser_exists() -> None:
    names = {rule.reasoning for rule in parsers.RULES if rule.reasoning}
    names |= {parsers.ALWAYS_THINKS, parsers.MAY_THINK}
    assert len(names) > 15
    assert names - registered("reasoning", "_REASONING_PARSERS_TO_REGISTER") == set()


def test_every_rule_proposes_something() -> None:
    assert all(rule.tool or rule.reasoning for rule in parsers.RULES)
