"""The shapes of workloads that estimates are tried on: published traces, and the guide's own.

What is absent is replaced by numbers drawn from distributions with the traces' published means; a
report says which of the two it was.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

AZURE = "azure_llm_2023_conv.csv"
MOONCAKE = "mooncake_synthetic_trace.jsonl"
#: Prompts of the second trace are made shorter, so that they fit the machines here.
_SHORTER = 4
_BLOCK_TOKENS = 512 // _SHORTER

#: Whether the requests set how long the answers are, limit them so that most are cut, or leave it
#: to the model.
Lengths = Literal["set", "cut", "natural"]


@dataclass(frozen=True)
class Requests:
    """In the order they run. `cacheable`: of each prompt, what a cache without a limit would hold.

    `limit` 0 where a request sets none; `fixed`: the answer takes all of it.
    """

    prompt: Ints
    output: Ints
    limit: Ints
    cacheable: Ints
    fixed: bool = False
    generates: bool = True


@dataclass(frozen=True)
class Shape:
    name: str
    about: str
    lengths: Lengths


SHAPES = (
    Shape("guide", "788 prompt and 308 output tokens on average, at most 1,024", "natural"),
    Shape("conversation", "rows of the Azure trace, at most 1,000", "natural"),
    Shape("short-prompts", "its rows below 600 prompt tokens, at most 1,000", "natural"),
    Shape("long-prompts", "its rows from 1,100 prompt tokens on, at most 1,000", "natural"),
    Shape("cut", "its rows, at most 128 output tokens", "cut"),
    Shape("label", "its prompts, at most 8 output tokens", "cut"),
    Shape("fixed-256", "its prompts, exactly 256 output tokens", "set"),
    Shape("fixed-1000", "60 to 200 prompt tokens, exactly 1,000 output tokens", "set"),
    Shape("embedding", "its prompts, nothing generated", "set"),
    Shape("documents", "rows of the Mooncake trace, a quarter as long, shared prefixes", "natural"),
    Shape("mixed", "its rows, one half at most 1,000, the other 16 output tokens", "natural"),
)


@dataclass
class Traces:
    """The rows that the shapes draw from. `sources`: where they are from, for the report."""

    azure: Ints  # prompt and output tokens, shape (n, 2)
    mooncake: list[tuple[int, int, tuple[int, ...]]]  # prompt, output, ids of blocks
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path | None) -> Traces:
        sources = {}
        path = folder / AZURE if folder else None
        if path is not None and path.is_file():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
            azure = np.array([[int(row[1]), int(row[2])] for row in rows], np.int64)
            sources["azure"] = f"{AZURE}, {len(azure):,} rows"
        else:
            azure = _stand_in_azure()
            sources["azure"] = "a stand-in, generated"
        path = folder / MOONCAKE if folder else None
        if path is not None and path.is_file():
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            mooncake = [
                (row["input_length"], row["output_length"], tuple(row["hash_ids"])) for row in lines
            ]
            sources["mooncake"] = f"{MOONCAKE}, {len(mooncake):,} rows"
        else:
            mooncake = _stand_in_mooncake()
            sources["mooncake"] = "a stand-in, generated"
        return cls(azure, mooncake, sources)

    def draw(self, shape: str, num: int, random: np.random.Generator) -> Requests:
        """So many requests of this shape; rows are drawn with replacement."""
        if shape == "guide":
            return _natural(
                _lognormal(random, num, 788.43, 0.5, 3000),
                _lognormal(random, num, 308.04, 0.55, 1024),
                1024,
            )
        if shape == "documents":
            return self._documents(num, random)
        rows = self.azure
        if shape == "short-prompts":
            rows = rows[rows[:, 0] < 600]
        elif shape == "long-prompts":
            rows = rows[(rows[:, 0] >= 1100) & (rows[:, 0] < 7000)]
        else:
            rows = rows[rows[:, 0] < 7000]
        chosen = rows[random.integers(0, len(rows), num)]
        prompt, output = chosen[:, 0], chosen[:, 1]
        zero = np.zeros(num, np.int64)
        if shape == "cut":
            return _natural(prompt, output, 128)
        if shape == "label":
            return _natural(prompt, output, 8)
        if shape == "fixed-256":
            return Requests(prompt, zero + 256, zero + 256, zero, fixed=True)
        if shape == "fixed-1000":
            return Requests(
                random.integers(60, 201, num), zero + 1000, zero + 1000, zero, fixed=True
            )
        if shape == "embedding":
            return Requests(prompt, zero, zero, zero, generates=False)
        if shape == "mixed":
            # Long ones first, as the planner has it.
            limit = np.where(np.arange(num) < num // 2, 1000, 16)
            return Requests(prompt, np.minimum(output, limit), limit, zero)
        return _natural(prompt, output, 1000)

    def _documents(self, num: int, random: np.random.Generator) -> Requests:
        usable = [row for row in self.mooncake if row[0] // _SHORTER < 7000]
        rows = [usable[place] for place in random.integers(0, len(usable), num)]
        # As the planner has it: those that begin alike one after the other.
        rows.sort(key=lambda row: row[2])
        cacheable, before = [], tuple[int, ...]()
        for _, _, blocks in rows:
            alike = 0
            while alike < min(len(before), len(blocks)) and before[alike] == blocks[alike]:
                alike += 1
            cacheable.append(alike * _BLOCK_TOKENS)
            before = blocks
        prompt = np.maximum(np.array([row[0] for row in rows], np.int64) // _SHORTER, 1)
        output = np.array([row[1] for row in rows], np.int64)
        held = np.minimum(np.array(cacheable, np.int64), prompt - 1)
        return Requests(prompt, np.minimum(output, 1000), np.full(num, 1000), held)


def _natural(prompt: Ints, output: Ints, limit: int) -> Requests:
    num = len(prompt)
    zero = np.zeros(num, np.int64)
    return Requests(prompt, np.minimum(output, limit), zero + limit, zero)


def _lognormal(random: np.random.Generator, num: int, mean: float, sigma: float, most: int) -> Ints:
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, num)
    return np.clip(np.rint(drawn), 4, most).astype(np.int64)


def _stand_in_azure() -> Ints:
    random = np.random.default_rng(20231116)
    prompt = _lognormal(random, 8000, 1155, 0.9, 14000)
    return np.stack((prompt, _lognormal(random, 8000, 211, 0.8, 1000)), axis=1)


def _stand_in_mooncake() -> list[tuple[int, int, tuple[int, ...]]]:
    random = np.random.default_rng(20250101)
    rows = []
    for number in range(2000):
        document, depth = int(random.integers(0, 200)), int(random.integers(1, 30))
        own = tuple(10**6 + number * 100 + place for place in range(int(random.integers(1, 12))))
        blocks = (*(document * 1000 + place for place in range(depth)), *own)
        rows.append((len(blocks) * 512 - 100, int(random.lognormal(4.3, 1.0)) + 1, blocks))
    return rows
