"""Which requests to count where counting all would take too long, and what follows for the rest.

Requests are put into strata by the length of their lines. Within one, tokens go with bytes almost
proportionally, so a few counted requests tell the ratio, and what they scatter around it tells the
error of the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NUM_STRATA = 16
LEAST_PER_STRATUM = 16
Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Strata:
    """`of[i]` is the stratum of request i; strata are numbered by length."""

    of: npt.NDArray[np.int8]
    sizes: npt.NDArray[np.int64]


def stratify(lengths: Lengths) -> Strata:
    """Strata of about equally many bytes: what is long counts more, so it is looked at closer."""
    edges = np.unique(lengths[_at_even_shares(lengths)])
    of = np.searchsorted(edges, lengths, side="left").astype(np.int8)
    return Strata(of, np.bincount(of, minlength=len(edges) + 1))


def _at_even_shares(lengths: Lengths) -> npt.NDArray[np.int64]:
    order = np.argsort(lengths, kind="stable")
    cumulative = np.cumsum(lengths[order], dtype=np.float64)
    shares = cumulative[-1] * np.arange(1, NUM_STRATA) / NUM_STRATA
    found: npt.NDArray[np.int64] = order[
        np.searchsorted(cumulative, shares).clip(max=len(order) - 1)
    ]
    return found


def choose(
    lengths: Lengths, strata: Strata, *, max_requests: int, max_bytes: int, seed: int = 0
) -> npt.NDArray[np.int64]:
    """The requests to count, in random order: whoever stops early has a random sample all the same.

    All of them where they are few and short enough.
    """
    random = np.random.default_rng(seed)
    everything = len(lengths) <= max_requests and int(lengths.sum()) <= max_bytes
    if everything:
        return random.permutation(len(lengths))
    sums = np.bincount(strata.of, weights=lengths, minlength=len(strata.sizes))
    means = sums / np.maximum(strata.sizes, 1)
    # The spread of a stratum grows with its length, and so does the cost of looking.
    wishes = strata.sizes * np.sqrt(means)
    wishes *= max_requests / max(wishes.sum(), 1e-9)
    cost = float((np.minimum(wishes, strata.sizes) * means).sum())
    wishes *= min(1.0, max_bytes / max(cost, 1e-9))
    numbers = np.minimum(
        np.maximum(np.ceil(wishes).astype(np.int64), LEAST_PER_STRATUM), strata.sizes
    )
    chosen = [
        random.choice(np.flatnonzero(strata.of == stratum), size=int(number), replace=False)
        for stratum, number in enumerate(numbers)
        if number
    ]
    return random.permutation(np.concatenate(chosen))


def spread(
    lengths: Lengths, strata: Strata, chosen: npt.NDArray[np.int64], counts: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float32], float]:
    """Tokens of every request, and the relative standard error of their sum.

    `counts[i]` are the tokens of `chosen[i]`, which keep their own; all others get their stratum's
    ratio of tokens to bytes. At least one must be counted.
    """
    counted = lengths[chosen].astype(np.float64)
    overall = counts.sum() / max(counted.sum(), 1.0)
    stratum_of = strata.of[chosen]
    ratios = np.full(len(strata.sizes), overall)
    variance = 0.0
    for stratum, size in enumerate(strata.sizes):
        mine = stratum_of == stratum
        number = int(mine.sum())
        if number:
            ratios[stratum] = counts[mine].sum() / max(counted[mine].sum(), 1.0)
        if not size or number == size:
            continue
        scatter = counts - ratios[stratum] * counted
        scatter = scatter[mine] if number > 1 else scatter
        variance += size**2 * (1 - number / size) * _variance(scatter) / max(number, 1)
    tokens = (ratios[strata.of] * lengths).astype(np.float32)
    tokens[chosen] = counts
    total = float(tokens.sum(dtype=np.float64))
    return tokens, math.sqrt(variance) / total if total else 0.0


def _variance(values: npt.NDArray[Any]) -> float:
    return float(np.square(values).sum() / max(len(values) - 1, 1))
