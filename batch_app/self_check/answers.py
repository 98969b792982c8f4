"""Whether answers are what their questions ask for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batch_app.engine.base import Outcome
from batch_app.self_check.questions import EXACT_TOKENS, SCHEMA_SUMS, Kind, Question
from batch_app.self_check.step import Figures

#: The share of sums that the demo model has to get right; it was trained to.
LEAST_RIGHT = 0.95
#: The share of pairs with one seed that have the same text, and of greedy answers that are those of
#: `LLM.chat`. Not 1: on a GPU, and in bfloat16, the logits of a request depend in their last bits
#: on the size of the batch it runs in, so another token may win where two are nearly level.
LEAST_SAME = 0.9
_MOST_TOLD = 5


@dataclass
class Verdicts:
    """What was found out about answers, summed up. Never holds a prompt or an answer.

    `wrong`: what no engine may do, each with number and kind. `shares`: right and asked, by what
    may differ now and then.
    """

    checked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    num_right: Counter[str] = field(default_factory=Counter)
    num_asked: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def share(self, name: str) -> float:
        asked = self.num_asked[name]
        return round(self.num_right[name] / asked, 4) if asked else 1.0

    def count(self, name: str, is_right: bool) -> None:
        self.num_asked[name] += 1
        self.num_right[name] += is_right

    def add(self, other: Verdicts) -> None:
        """Add what was found out about other answers."""
        self.checked += other.checked
        self.wrong += other.wrong
        self.num_right += other.num_right
        self.num_asked += other.num_asked
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def figures(self) -> Figures:
        return {
            "checked": dict(self.checked),
            "num_wrong": len(self.wrong),
            "wrong": self.wrong[:_MOST_TOLD],
            "shares": {name: self.share(name) for name in sorted(self.num_asked)},
        }


def texts_of(outcome: Outcome) -> list[str]:
    """The text of each choice of a chat's answer."""
    body = json.loads(outcome.body)
    return [choice["message"]["content"] or "" for choice in body["choices"]]


def check(asked: Iterable[Question], outcomes: Mapping[int, Outcome], *, is_demo: bool) -> Verdicts:
    """Check each answer. `is_demo`: the model can add."""
    verdicts = Verdicts()
    for question in asked:
        verdicts.checked[question.kind] += 1
        outcome = outcomes.get(question.number)
        fault = "was not answered" if outcome is None else _fault(question, outcome)
        if fault or outcome is None:
            verdicts.wrong.append(f"{question.kind} request {question.number}: {fault}")
            continue
        verdicts.prompt_tokens += outcome.prompt_tokens
        verdicts.completion_tokens += outcome.completion_tokens
        _compare(question, outcome, outcomes, verdicts, is_demo=is_demo)
    return verdicts


def _fault(question: Question, outcome: Outcome) -> str:
    """What is wrong with an answer, whatever the model; empty if nothing is."""
    if outcome.status_code != 200 or outcome.error_code:
        return f"failed with status {outcome.status_code}"
    body: dict[str, Any] = json.loads(outcome.body)
    usage, choices = body["usage"], body["choices"]
    counts = usage["prompt_tokens"], usage["completion_tokens"]
    if counts != (outcome.prompt_tokens, outcome.completion_tokens):
        return "its usage is not what the engine counted"
    if [choice["index"] for choice in choices] != list(range(question.fields.get("n", 1))):
        return f"has {len(choices)} choices, or their indexes are wrong"
    tokens, limit = outcome.completion_tokens, question.fields["max_tokens"] * len(choices)
    if not 0 < tokens <= limit:
        return f"has {tokens} tokens, of at most {limit}"
    text = choices[0]["message"]["content"] or ""
    if question.kind is Kind.LENGTH and tokens != EXACT_TOKENS:
        return f"has {tokens} tokens, not {EXACT_TOKENS}"
    if question.kind is Kind.STOP and question.stop in text:
        return "goes on after its stop string"
    if question.kind is Kind.SCHEMA:
        return _schema_fault(text)
    return ""


def _schema_fault(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return "is not JSON"
    fits = isinstance(value, dict) and list(value) == ["sum"] and value["sum"] in SCHEMA_SUMS
    return "" if fits else "doesn't fit its schema"


def _compare(
    question: Question,
    outcome: Outcome,
    outcomes: Mapping[int, Outcome],
    verdicts: Verdicts,
    *,
    is_demo: bool,
) -> None:
    text = texts_of(outcome)[0].strip()
    if question.kind is Kind.SEEDED and question.twin is not None:
        twin = outcomes.get(question.twin)
        if twin is not None and twin.status_code == 200:
            verdicts.count("same seed", texts_of(outcome) == texts_of(twin))
    elif question.kind is Kind.GREEDY and is_demo:
        verdicts.count("sums", text == str(question.total))
    elif question.kind is Kind.STOP and is_demo:
        verdicts.count("stopped", text == str(question.total).partition(question.stop)[0])
