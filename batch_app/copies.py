"""Copies: the answer of one request given to those that ask exactly the same.

The plan knows equals by a hash of their bodies; here the bodies themselves are compared, so that a
collision, chance or malice, can't put one request's answer under another's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import msgspec

from batch_app.engine.base import Outcome
from batch_app.index import Index
from batch_app.inputs import InputFile
from batch_app.keeper import Delivery
from batch_app.results import ResultsLog

#: Answers that are copied before others get a turn: one request may have a million equals.
AT_ONCE = 1000


class _Response(msgspec.Struct):
    body: msgspec.Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    response: _Response | None
    error: _Error | None


_decode = msgspec.json.Decoder(_Line).decode


class Copies:
    """Answers for the equals of answered requests.

    `refused` collects those that have to be computed after all: their bodies differ, or the answer
    is a failure of the engine's rather than of the request's.
    """

    def __init__(self, index: Index, inputs: InputFile) -> None:
        self._endpoints = index.records["endpoint"]
        self._inputs = inputs
        self.refused: list[int] = []

    def of(self, outcome: Outcome, followers: Iterable[int]) -> Iterator[list[Delivery]]:
        """The deliveries for those of `followers` that asked what this outcome answers."""
        numbers = iter(followers)
        if outcome.status_code >= 500 and not outcome.error_code:
            self.refused.extend(numbers)
            return
        body = bytes(self._inputs.request(outcome.number).body)
        endpoint = self._endpoints[outcome.number]
        while some := list(islice(numbers, AT_ONCE)):
            deliveries = []
            for number in some:
                request = self._inputs.request(number)
                if bytes(request.body) == body and self._endpoints[number] == endpoint:
                    answer = msgspec.structs.replace(outcome, number=number)
                    deliveries.append(Delivery(request.custom_id, answer, copied=True))
                else:
                    self.refused.append(number)
            yield deliveries


def logged_outcome(log: ResultsLog, number: int) -> Outcome:
    """The outcome of a done request, from the results log."""
    line = _decode(log.read(number))
    if line.response is None:
        error = line.error or _Error("server_error", "The request was not run.")
        status = log.status_code(number)
        return Outcome(number, status, error.message.encode(), error_code=error.code)
    tokens = log.tokens(number)
    return Outcome(
        number,
        log.status_code(number),
        bytes(line.response.body),
        tokens.prompt_tokens,
        tokens.completion_tokens,
        tokens.cached_tokens,
        tokens.reasoning_tokens,
        finish_reason=log.finish_reason(number),
    )
