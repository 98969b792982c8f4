"""What the contenders answered: all of it, and the same. A figure without that says nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer.workloads import Line

#: In float32 two batch shapes rarely choose another token; in bfloat16 they often do.
LEAST_EQUAL = {"float32": 0.95}


class WrongAnswers(Exception):
    """A contender left requests out, failed some, or answered something else."""


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


Answers = dict[str, Answer]


def read_answers(path: Path, requests: Sequence[Line], *, exact: bool = True) -> Answers:
    """The answers by `custom_id`.

    `exact`: each must have as many tokens as its request's `max_tokens`.

    Raises WrongAnswers: one is missing, there twice, failed, or of another length.
    """
    found: Answers = {}
    with path.open("rb") as file:
        for raw in file:
            custom_id, answer = _answer(json.loads(raw))
            if custom_id in found:
                raise WrongAnswers(f"{custom_id} was answered twice.")
            found[custom_id] = answer
    for request in requests:
        custom_id, wanted = request["custom_id"], request["body"]["max_tokens"]
        if custom_id not in found:
            raise WrongAnswers(f"{custom_id} was not answered.")
        tokens = found[custom_id].completion_tokens
        if exact and tokens != wanted:
            raise WrongAnswers(f"{custom_id} was answered with {tokens} tokens, not {wanted}.")
    if len(found) != len(requests):
        raise WrongAnswers(f"{len(found)} answers to {len(requests)} requests.")
    return found


def _answer(line: Line) -> tuple[str, Answer]:
    custom_id, response = line["custom_id"], line.get("response") or {}
    if response.get("status_code") != 200:
        raise WrongAnswers(f"{custom_id} failed: {line.get('error') or response}"[:500])
    body = response["body"]
    usage = body["usage"]
    details = usage.get("prompt_tokens_details") or {}
    return custom_id, Answer(
        body["choices"][0]["message"]["content"] or "",
        usage["prompt_tokens"],
        usage["completion_tokens"],
        details.get("cached_tokens") or 0,
    )


def share_equal(ours: Answers, theirs: Answers) -> float:
    """The share of answers whose text is the same.

    Raises WrongAnswers where they were not asked the same: token counts differ.
    """
    num_equal = 0
    for custom_id, answer in ours.items():
        other = theirs[custom_id]
        counts = answer.prompt_tokens, answer.completion_tokens
        if counts != (other.prompt_tokens, other.completion_tokens):
            raise WrongAnswers(f"{custom_id}: the token counts differ.")
        num_equal += answer.text == other.text
    return num_equal / len(ours) if ours else 1.0


def hit_share(answers: Answers) -> float:
    """The share of all prompt tokens that came from the prefix cache."""
    total = sum(answer.prompt_tokens for answer in answers.values())
    return sum(answer.cached_tokens for answer in answers.values()) / total if total else 0.0
