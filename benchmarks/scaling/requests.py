"""The requests that are measured with: groups that begin alike, answers of 10 to 30 tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator

import orjson

from batch_app.core import Endpoint
from batch_app.engine.base import EngineRequest

GROUP_SIZE = 10
#: Marks that the requests of a group share.
SHARED = 20
WORDS = "one two three four five six seven eight nine ten " * 3
MIN_TOKENS, MAX_TOKENS = 10, 30


def requests(count: int) -> Iterator[EngineRequest]:
    """The same ones for the same count."""
    rng = random.Random(count)
    for number in range(count):
        body = {
            "messages": [{"role": "user", "content": f"{WORDS}{number}"}],
            "max_tokens": rng.randint(MIN_TOKENS, MAX_TOKENS),
        }
        shared = SHARED if number % GROUP_SIZE else 0
        endpoint = Endpoint.CHAT_COMPLETIONS.value
        yield EngineRequest(number, endpoint, orjson.dumps(body), shared)
