"""The requests of a self-check: what is asked, and what the answer has to be like."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from batch_app.core import Endpoint
from batch_app.engine.base import EngineRequest

_WORDINGS = ("What is {a} + {b}?", "Compute {a} + {b}.", "How much is {a} + {b}?")
_LOWEST, _HIGHEST = 10, 99
MAX_TOKENS = 16
#: Of a request of kind LENGTH, and of one that is going to be aborted.
EXACT_TOKENS, LONG_TOKENS = 24, 400
SCHEMA_SUMS = (85, 7, 120)
_SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": list(SCHEMA_SUMS)}},
    "required": ["sum"],
    "additionalProperties": False,
}


class Kind(StrEnum):
    GREEDY = "greedy"
    SEEDED = "seeded"
    """Asked twice with the same seed."""
    STOP = "stop"
    CHOICES = "choices"
    SCHEMA = "schema"
    LENGTH = "length"
    LONG = "long"
    """To be aborted."""


#: Of ten requests. Those of kind SEEDED come in pairs.
_MIX = (
    *(Kind.GREEDY,) * 4,
    *(Kind.SEEDED,) * 2,
    *(Kind.STOP, Kind.CHOICES, Kind.SCHEMA, Kind.LENGTH),
)


@dataclass(frozen=True, slots=True)
class Question:
    """`total` is the sum that is asked for. `twin`: the number of the same question's other copy.

    `stop` is the text at which the answer has to end.
    """

    number: int
    kind: Kind
    prompt: str
    total: int
    fields: Mapping[str, Any]
    twin: int | None = None
    stop: str = ""

    @property
    def request(self) -> EngineRequest:
        body = {"messages": [{"role": "user", "content": self.prompt}], **self.fields}
        return EngineRequest(self.number, Endpoint.CHAT_COMPLETIONS, json.dumps(body).encode())


def questions(count: int, seed: int, first: int = 0) -> list[Question]:
    """Make `count` questions, numbered from `first`. The same arguments make the same ones."""
    return list(_questions(random.Random(seed), count, first))


def _questions(rng: random.Random, count: int, first: int) -> Iterator[Question]:
    pending: Question | None = None
    for place in range(count):
        number, kind = first + place, _MIX[place % len(_MIX)]
        if kind is Kind.SEEDED and pending is not None:
            twin, pending = pending, None
            yield _numbered(twin, number, twin.number)
            continue
        question = _question(rng, number, kind)
        if kind is Kind.SEEDED:
            pending = question
        yield question


def _numbered(question: Question, number: int, twin: int) -> Question:
    return Question(number, question.kind, question.prompt, question.total, question.fields, twin)


def _question(rng: random.Random, number: int, kind: Kind) -> Question:
    a, b = rng.randint(_LOWEST, _HIGHEST), rng.randint(_LOWEST, _HIGHEST)
    prompt, total, stop = rng.choice(_WORDINGS).format(a=a, b=b), a + b, ""
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_TOKENS}
    if kind is Kind.SEEDED:
        fields |= {"temperature": 1.5, "seed": rng.getrandbits(31), "ignore_eos": True}
    elif kind is Kind.STOP:
        stop = str(total)[-1]
        fields["stop"] = [stop]
    elif kind is Kind.CHOICES:
        fields |= {"temperature": 1.0, "n": 2}
    elif kind is Kind.SCHEMA:
        schema = {"name": "answer", "schema": _SCHEMA}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        fields["max_tokens"] = 64
    elif kind is Kind.LENGTH:
        fields |= {"ignore_eos": True, "max_tokens": EXACT_TOKENS}
    return Question(number, kind, prompt, total, fields, stop=stop)


def long_questions(count: int, seed: int, first: int) -> list[Question]:
    """Make questions whose answers take long, to be aborted meanwhile."""
    rng = random.Random(seed)
    made = []
    for place in range(count):
        asked = _question(rng, first + place, Kind.LENGTH)
        fields = {**asked.fields, "max_tokens": LONG_TOKENS}
        made.append(Question(asked.number, Kind.LONG, asked.prompt, asked.total, fields))
    return made
