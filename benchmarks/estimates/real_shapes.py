"""The jobs for the real engine: rows of the published traces, made smaller, and shapes of its own.

The model that ships knows sums and little else, so that its own answers can't be as long as the
traces' are. Those jobs make it generate as many tokens as the row has; the estimator hears only of
the limit that all rows share, as it would of a model whose answers end by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.estimates.shapes import Lengths, Traces

#: By what the traces' prompts and answers are divided, and what of them is taken at the most.
AZURE_SHORTER, MOONCAKE_SHORTER = 8, 32
MOST_PROMPT_TOKENS, LIMIT = 750, 125
#: A block of the Mooncake trace is 512 tokens.
_MOONCAKE_BLOCK = 512 // MOONCAKE_SHORTER
#: So many tokens of the demo model are a number of two digits and a space, and a chat's frame.
TOKENS_PER_WORD, FRAME_TOKENS = 3, 12
#: The engine shares whole blocks of the cache, so large on a CPU.
_CACHE_BLOCK = 128


@dataclass(frozen=True)
class Asked:
    """A request. `limit`, `fixed`: what the estimator is told of its answer's length.
    `cacheable`: prompt tokens that those just before it have in common with it."""

    body: dict[str, Any]
    limit: int
    fixed: bool = False
    cacheable: int = 0


Make = Callable[[Traces, np.random.Generator, int], list[Asked]]


@dataclass(frozen=True)
class RealShape:
    about: str
    lengths: Lengths
    make: Make


def _numbers(random: np.random.Generator, num: int) -> str:
    return " ".join(str(value) for value in random.integers(10, 99, max(num, 1)).tolist())


def _body(text: str, limit: int) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"messages": [message], "max_tokens": limit, "temperature": 0}


def _made_to(text: str, tokens: int) -> dict[str, Any]:
    return _body(text, tokens) | {"ignore_eos": True, "min_tokens": tokens}


def _sums(_: Traces, random: np.random.Generator, num: int) -> list[Asked]:
    pairs = random.integers(10, 99, (num, 2)).tolist()
    return [Asked(_body(f"What is {a} + {b}?", 16), 16) for a, b in pairs]


def _fixed(prompt_words: tuple[int, int], tokens: tuple[int, int]) -> Make:
    """Prompts and answers of so many words and tokens; the answers take all of their limit."""

    def make(_: Traces, random: np.random.Generator, num: int) -> list[Asked]:
        sizes = random.integers(prompt_words[0], prompt_words[1] + 1, num).tolist()
        limits = np.sort(random.integers(tokens[0], tokens[1] + 1, num))[::-1].tolist()
        return [
            Asked(_made_to(_numbers(random, size), limit), limit, fixed=True)
            for size, limit in zip(sizes, limits, strict=True)
        ]

    return make


def _azure(limit: int) -> Make:
    """Rows of the Azure trace, an eighth as long; answers end by themselves or at the limit."""

    def make(traces: Traces, random: np.random.Generator, num: int) -> list[Asked]:
        rows = traces.azure[traces.azure[:, 0] <= MOST_PROMPT_TOKENS * AZURE_SHORTER]
        chosen = rows[random.integers(0, len(rows), num)] // AZURE_SHORTER
        return [
            Asked(
                _made_to(
                    _numbers(random, (prompt - FRAME_TOKENS) // TOKENS_PER_WORD),
                    min(max(output, 1), limit),
                ),
                limit,
            )
            for prompt, output in chosen.tolist()
        ]

    return make


def _documents(traces: Traces, random: np.random.Generator, num: int) -> list[Asked]:
    """Rows of the Mooncake trace, a 32nd as long, in the order that the planner gives them."""
    usable = [row for row in traces.mooncake if row[0] <= MOST_PROMPT_TOKENS * MOONCAKE_SHORTER]
    rows = [usable[place] for place in random.integers(0, len(usable), num)]
    rows.sort(key=lambda row: row[2])
    asked, before = [], tuple[int, ...]()
    for prompt, output, blocks in rows:
        alike = 0
        while alike < min(len(before), len(blocks)) and before[alike] == blocks[alike]:
            alike += 1
        before = blocks
        # The same block has the same words wherever it stands.
        words = (_MOONCAKE_BLOCK - 1) // TOKENS_PER_WORD
        text = " ".join(_numbers(np.random.default_rng(block), words) for block in blocks)
        wanted = max(prompt // MOONCAKE_SHORTER - FRAME_TOKENS, TOKENS_PER_WORD)
        text = text[:wanted]  # a character or a space is a token
        tokens = min(max(output // MOONCAKE_SHORTER, 1), LIMIT)
        shared = min(alike * words * TOKENS_PER_WORD, wanted) // _CACHE_BLOCK * _CACHE_BLOCK
        asked.append(Asked(_made_to(text, tokens), LIMIT, cacheable=shared))
    return asked


REAL_SHAPES: dict[str, RealShape] = {
    "sums": RealShape("sums that the model answers by itself", "natural", _sums),
    "conversation": RealShape("rows of the Azure trace, an eighth", "natural", _azure(LIMIT)),
    "cut": RealShape("the same, at most 12 output tokens", "cut", _azure(12)),
    "documents": RealShape("rows of the Mooncake trace, a 32nd", "natural", _documents),
    "short-64": RealShape("short prompts, 64 tokens", "set", _fixed((5, 30), (64, 64))),
    "short-mixed": RealShape("short prompts, 8 to 128 tokens", "set", _fixed((5, 30), (8, 128))),
    "medium-32": RealShape("50 to 125 words, about 32", "set", _fixed((50, 125), (16, 48))),
    "long-8": RealShape("150 to 250 words, 8 tokens", "set", _fixed((150, 250), (8, 8))),
    "long-answers": RealShape("short prompts, long answers", "set", _fixed((20, 60), (150, 250))),
}  # fmt: skip
