"""Constraints: what an answer may be bound to, as checks: expressions, JSON Schemas, grammars.

vLLM compiles them beside the work of everybody else, and small ones can be made to take hours, or
all memory. So they are bounded in length, and in what they unfold to.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from batch_app.shapes import BodyLimits, Check, array, problem, short, text, text_up_to, wrong_type

#: Repetitions that a regular expression may unfold to: `(a{100}){100}` is 10,000.
MAX_REGEX_UNFOLDED = 20_000
#: `*`, `+` and `{n,}` in one expression or grammar: to compile many of them in a row takes a time
#: that grows with their cube.
MAX_LOOPS = 256
_LOOP = re.compile(r"(?P<loop>[*+]|\{\d*,\})|\\.|\[(?:\\.|[^\]\\])*\]?", re.DOTALL)
_LOOP_OF_GRAMMAR = re.compile(r"(?P<loop>[*+]|\{\d*,\})|\"(?:\\.|[^\"\\])*\"?", re.DOTALL)
#: Of JSON Schema's `minLength`, `maxItems` and their like, which grammars unfold.
MAX_SCHEMA_COUNT = 100_000
_SCHEMA_COUNTS = frozenset(
    {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
)
_SCHEMA_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})


def regex(value: Any, name: str, limits: BodyLimits) -> None:
    """A regular expression that a grammar may be made of: short, and short when unfolded."""
    text(value, name, limits)
    if len(value) > limits.max_regex_chars:
        raise problem(
            name,
            f'"{name}" must have at most {limits.max_regex_chars} characters (max_regex_chars).',
        )
    if unfolded_size(value) > MAX_REGEX_UNFOLDED:
        raise problem(
            name,
            f'"{name}" repeats too much: written out, it would have more than '
            f"{MAX_REGEX_UNFOLDED} parts. Use smaller counts, or * and +.",
        )
    _require_few_loops(_LOOP, value, name)


def _require_few_loops(loop: re.Pattern[str], value: str, name: str) -> None:
    if sum(found["loop"] is not None for found in loop.finditer(value)) > MAX_LOOPS:
        raise problem(name, f'"{name}" has more than {MAX_LOOPS} repetitions without an end.')


def unfolded_size(pattern: str) -> int:
    """How many atoms the expression has when its counted repetitions are written out."""
    groups: list[int] = []
    size = 0  # of the group that we are in
    last = 0  # size of the atom or group that a quantifier would repeat
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "(":
            groups.append(size)
            size = last = 0
        elif char == ")" and groups:
            last = max(1, size)
            size = groups.pop() + last
        elif char == "{" and (end := pattern.find("}", at)) >= 0:
            counts = [part for part in pattern[at:end].split(",") if part.strip().isdecimal()]
            if counts:
                # More digits than this is more than any bound, and slow to convert.
                most = max(int(count) if len(count) < 12 else 10**12 for count in counts)
                size += last * (most - 1)
                last *= max(1, most)
                at = end + 1
            else:
                size, last = size + 1, 1
        elif char in "*+?|^$":
            continue
        else:
            if char == "\\":
                at += 1
            elif char == "[":
                while at < len(pattern) and pattern[at] != "]":
                    at += 2 if pattern[at] == "\\" else 1
                at += 1
            size, last = size + 1, 1
    return size + sum(groups)


def schema(value: Any, name: str, limits: BodyLimits) -> None:
    """A JSON Schema (or another free object) of bounded size and depth, that refers to itself only.

    What a grammar can't be made of, vLLM answers for that request alone.
    """
    if not isinstance(value, (dict, bool)):
        raise wrong_type(name, "an object (a JSON Schema)", value)
    if _walk_schema(value, name, limits, 1) > limits.max_schema_bytes:
        raise problem(
            name,
            f'"{name}" must have at most {limits.max_schema_bytes} bytes (max_schema_bytes).',
        )


def schema_or_text(value: Any, name: str, limits: BodyLimits) -> None:
    """A schema, or the JSON text of one, which is held to the same."""
    if isinstance(value, str):
        schema_text(value, name, limits)
    else:
        schema(value, name, limits)


def schema_text(value: Any, name: str, limits: BodyLimits) -> None:
    """The JSON text of a schema, or of a structural tag."""
    text(value, name, limits)
    _require_short(value, name, limits)
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError:
        raise problem(name, f'"{name}" is a text, but not one of JSON.') from None
    schema(parsed, name, limits)


def _walk_schema(value: Any, name: str, limits: BodyLimits, depth: int) -> int:
    """The size of it in bytes, roughly as compact JSON has it."""
    if isinstance(value, str):
        return len(value.encode()) + 2
    if not isinstance(value, (dict, list)):
        return 4
    if depth > limits.max_schema_depth:
        raise problem(
            short(name),
            f'"{short(name)}" is nested deeper than {limits.max_schema_depth} levels '
            "(max_schema_depth).",
        )
    if isinstance(value, list):
        return 2 + sum(_walk_schema(item, name, limits, depth + 1) + 1 for item in value)
    size = 2
    for key, item in value.items():
        at = f"{short(name)}.{short(key)}"
        if key == "pattern" and not isinstance(item, (dict, bool)):
            regex(item, at, limits)
        elif key == "patternProperties" and isinstance(item, dict):
            for pattern in item:
                regex(pattern, at, limits)
        elif key == "grammar" and isinstance(item, str):
            grammar(item, at, limits)
        elif key in _SCHEMA_COUNTS and isinstance(item, (int, float)) and item > MAX_SCHEMA_COUNT:
            raise problem(at, f'"{at}" must be at most {MAX_SCHEMA_COUNT}.')
        elif key in _SCHEMA_REFERENCES and isinstance(item, str) and not item.startswith("#"):
            raise problem(at, f'"{at}" must refer to the schema itself: "#...".')
        size += len(key.encode()) + 4 + _walk_schema(item, name, limits, depth + 1)
    return size


#: Of `structured_outputs.choice`: how many, and the characters of each.
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 512


def within_bytes(check: Check, schemas: int = 1) -> Check:
    """What this check takes, if its JSON has at most `schemas` times `max_schema_bytes`."""

    def check_size(value: Any, name: str, limits: BodyLimits) -> None:
        check(value, name, limits)
        most = schemas * limits.max_schema_bytes
        if len(orjson.dumps(value)) > most:
            times = f"{schemas} times max_schema_bytes" if schemas > 1 else "max_schema_bytes"
            raise problem(name, f'"{name}" must have at most {most} bytes ({times}).')

    return check_size


#: The answers that a model may choose from; together they are a grammar.
choices = within_bytes(array(text_up_to(MAX_CHOICE_CHARS), most=MAX_CHOICES, least=1))


def grammar(value: Any, name: str, limits: BodyLimits) -> None:
    """A grammar in EBNF or Lark's notation: short, and hardly longer when it is unfolded."""
    text(value, name, limits)
    _require_short(value, name, limits)
    if unfolded_size(value) > len(value) + MAX_REGEX_UNFOLDED:
        raise problem(name, f'"{name}" repeats too much. Use smaller counts, or * and +.')
    _require_few_loops(_LOOP_OF_GRAMMAR, value, name)


def _require_short(value: str, name: str, limits: BodyLimits) -> None:
    if len(value) > limits.max_schema_bytes:
        raise problem(
            name,
            f'"{name}" must have at most {limits.max_schema_bytes} characters (max_schema_bytes).',
        )
