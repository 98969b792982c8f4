"""What the batches of a trial ask, and which answers are right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import demo_tasks

from support.site import echo_line

#: Prompts of more words are too long for the model, and refused by it.
MAX_WORDS = 8


class Workload(Protocol):
    def lines(self, chance: random.Random, at_least: int) -> list[dict[str, Any]]:
        """The requests of one batch."""

    def check(self, responses: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
        """How many of these lines were answered, and not refused, by their responses. Raises
        AssertionError where it should have been the other one, or an answer isn't its line's."""


class EchoWorkload:
    """Each answer is its prompt, and one prompt in ten is too long."""

    def lines(self, chance: random.Random, at_least: int) -> list[dict[str, Any]]:
        lines = []
        for number in range(chance.randint(at_least, 300)):
            line = echo_line(number)
            if chance.random() < 0.1:
                line["body"]["messages"][0]["content"] += " word" * MAX_WORDS
            lines.append(line)
        return lines

    def check(self, responses: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
        return sum(self._is_answered(line, response) for line, response in responses)

    def _is_answered(self, line: dict[str, Any], response: dict[str, Any]) -> bool:
        prompt = line["body"]["messages"][0]["content"]
        if len(prompt.split()) > MAX_WORDS:
            status = response["status_code"]
            assert status == 400, f"{line['custom_id']}: status {status}"
            return False
        said = response["body"]["choices"][0]["message"]["content"]
        assert said == prompt, f"{line['custom_id']} has another's answer"
        return True


class DemoWorkload:
    """Questions that the demo model answers; nearly always rightly."""

    def lines(self, chance: random.Random, at_least: int) -> list[dict[str, Any]]:
        count = chance.randint(max(at_least, 200), 1500)
        return list(demo_tasks.make_requests(count, seed=chance.randrange(1 << 30)))

    def check(self, responses: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int:
        lines = [line for line, _ in responses]
        results = [{"custom_id": line["custom_id"], "response": it} for line, it in responses]
        counts = demo_tasks.check(lines, results)
        assert counts["failed"] == 0, counts
        assert counts["right"] >= demo_tasks.PASS_SHARE * len(lines), counts
        return len(lines)
