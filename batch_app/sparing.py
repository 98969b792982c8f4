"""Sparing: which share of its prompt the prefix cache will hold for each request. Pure.

In the planned order the longest beginning that a request shares with any earlier one is the one it
shares with the request just before it, and that one's blocks are the youngest in the cache. In the
order of the file, what is shared may lie far back: then it counts only if less than the cache's
capacity was put in since.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from batch_app.index import Index
from batch_app.prefixes import MARKS

Shares = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

#: Blocks are shared whole: on average half a one less than what is equal.
BLOCK_TOKENS = 16
#: Marks that are looked at together where the order isn't the planner's.
MOST_MARKS_SORTED = 2_000_000


def spared_shares(
    index: Index,
    order: Numbers,
    tokens: npt.NDArray[np.float32],
    *,
    by_prefix: bool,
    kv_cache_tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
) -> Shares:
    """For each place in `order`: of the request's prompt tokens, the share that is spared; 0 to 1.

    `tokens[i]`: prompt tokens of `order[i]`. `by_prefix`: the order is the planner's.
    `kv_cache_tokens` None: nothing is ever dropped. Memory: some 60 bytes a request.
    """
    if len(order) < 2:
        return np.zeros(len(order), np.float32)
    shared = (
        _with_the_one_before(index, order)
        if by_prefix
        else _with_any_before(index, order, tokens, kv_cache_tokens)
    )
    lengths = index.records["length"][order].astype(np.float64)
    # A prompt's stream is a little shorter than its line: what is shared is at most all of it.
    share = np.minimum(_bytes_at(shared) / np.maximum(lengths, 1.0), 1.0)
    blocks = np.floor(share * tokens / block_tokens) * block_tokens
    # The last token is always computed.
    spared = np.minimum(blocks, np.maximum(tokens - 1.0, 0.0))
    if by_prefix and kv_cache_tokens is not None:
        # A cache that can't hold one prompt keeps nothing of it for the next.
        spared[tokens > kv_cache_tokens] = 0.0
    saved = np.zeros(len(order), np.float32)
    np.divide(spared, tokens, out=saved, where=tokens > 0, casting="unsafe")
    return saved


def _bytes_at(num_marks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Bytes that are equal where the first so many marks are: half a stretch beyond the last."""
    marks = np.array((0, *MARKS), dtype=np.float64)
    beyond = np.append(np.diff(marks), 0.0) / 2
    beyond[0] = 0.0
    return np.asarray((marks + beyond)[num_marks])


def _starts(index: Index, order: Numbers) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    num_marks = index.records["num_marks"]
    ends = np.cumsum(num_marks, dtype=np.int64)
    mine = num_marks[order]
    return mine, ends[order] - mine


def _with_the_one_before(index: Index, order: Numbers) -> npt.NDArray[np.int64]:
    """How many marks each place has in common with the one before it."""
    num_marks, starts = _starts(index, order)
    common = np.zeros(len(order), dtype=np.int64)
    active = np.arange(1, len(order))
    depth = 0
    while len(active):
        active = active[(num_marks[active] > depth) & (num_marks[active - 1] > depth)]
        here = index.prefixes[starts[active] + depth]
        before = index.prefixes[starts[active - 1] + depth]
        active = active[here == before]
        common[active] += 1
        depth += 1
    return common


def _with_any_before(
    index: Index,
    order: Numbers,
    tokens: npt.NDArray[np.float32],
    kv_cache_tokens: int | None,
) -> npt.NDArray[np.int64]:
    """The same with whichever earlier place is still in the cache.

    Looks at as many requests from the start as `MOST_MARKS_SORTED` allows; the rest is taken to be
    as these are, on average.
    """
    num_marks, starts = _starts(index, order)
    sums = np.cumsum(num_marks, dtype=np.int64)
    seen = max(int(np.searchsorted(sums, MOST_MARKS_SORTED)), 1)
    place_of = np.repeat(np.arange(seen), num_marks[:seen])
    depth_of = np.arange(len(place_of)) - np.repeat(
        sums[:seen] - num_marks[:seen], num_marks[:seen]
    )
    marks = index.prefixes[starts[place_of] + depth_of]
    key = depth_of.astype(np.uint64) << np.uint64(32) | marks
    by_key = np.argsort(key, kind="stable")
    same = key[by_key][1:] == key[by_key][:-1]
    before = np.full(len(key), -1, dtype=np.int64)
    before[by_key[1:][same]] = place_of[by_key[:-1][same]]
    put_in = np.concatenate(([0.0], np.cumsum(tokens[:seen], dtype=np.float64)))
    hit = before >= 0
    if kv_cache_tokens is not None:
        hit &= put_in[place_of] - put_in[np.maximum(before, 0)] <= kv_cache_tokens
    # Equal up to a mark only if equal up to every mark before it.
    broken = np.where(hit, len(key), depth_of)
    first_broken = np.full(seen, len(key), dtype=np.int64)
    np.minimum.at(first_broken, place_of, broken)
    common = np.zeros(len(order), dtype=np.int64)
    common[:seen] = np.minimum(first_broken, num_marks[:seen])
    if seen < len(order):
        share = common[:seen].sum() / max(int(sums[seen - 1]), 1)
        common[seen:] = np.round(num_marks[seen:] * share)
    return common
