"""The schedule: in how many steps, of which size, an engine does its work. Pure; knows no seconds.

Follows what continuous batching does (requests join and leave between steps, long prompts come in
chunks, each running request gets one token a step), because the number of steps isn't proportional
to the tokens: few requests, a small cache and the end of a run make steps with little in them.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023; Agrawal et al., "Sarathi-Serve", 2024 (chunked prefill).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from batch_app.forecast.measurement import Limits

Numbers = npt.NDArray[np.float64]

#: Where nobody says: vLLM's own limits, and what a 4B model leaves of a card with 16 GiB. Together
#: with `lengths._SIGMA_OF_MEAN` these are chosen so that the usage guide's figures come of its
#: benchmark, which says neither.
DEFAULT_SEQS = 256
DEFAULT_BATCHED_TOKENS = 8192
DEFAULT_KV_TOKENS = 16384
#: A KV block holds 16 tokens; the last one of a request is half empty.
_HALF_BLOCK = 8
#: Kept free when a request is let in, so that those that run can grow.
_WATERMARK = 0.01


@dataclass(frozen=True, slots=True)
class Capacity:
    """`Limits` without gaps."""

    max_num_seqs: int = DEFAULT_SEQS
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    kv_cache_tokens: int = DEFAULT_KV_TOKENS

    @classmethod
    def of(cls, *told: Limits | None) -> Capacity:
        """The first that says something counts, field by field."""
        known = [limits for limits in told if limits is not None]
        seqs = next((one.max_num_seqs for one in known if one.max_num_seqs), DEFAULT_SEQS)
        batched = [one.max_num_batched_tokens for one in known if one.max_num_batched_tokens]
        kv_cache = [one.kv_cache_tokens for one in known if one.kv_cache_tokens]
        return cls(
            seqs,
            next(iter(batched), DEFAULT_BATCHED_TOKENS),
            next(iter(kv_cache), DEFAULT_KV_TOKENS),
        )


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps that are alike, put together: shape (k,) each.

    `count`: how many; of each of them, as means: `running` requests that get a token, `prefill`
    tokens computed, `attended`: prefill tokens times the tokens before each, `context`: tokens in
    the cache that the running ones look at, `started`: requests whose prompt is begun.
    """

    count: Numbers
    running: Numbers
    prefill: Numbers
    attended: Numbers
    context: Numbers
    started: Numbers

    @property
    def num_steps(self) -> float:
        return float(self.count.sum())

    def times(self, factor: float) -> Steps:
        """As many times the same steps."""
        return Steps(
            self.count * factor,
            self.running,
            self.prefill,
            self.attended,
            self.context,
            self.started,
        )

    @classmethod
    def join(cls, *parts: Steps) -> Steps:
        return cls(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            )
        )


def condensed(rows: npt.ArrayLike) -> Steps:
    """Rows of (count, running, prefill, attended, context, started), the similar ones merged."""
    table = np.asarray(rows, np.float64).reshape(-1, 6)
    if not len(table):
        return Steps(*np.zeros((6, 0)))
    keys = np.rint(np.log2(1.0 + table[:, 1]) * 6) * 1000 + np.rint(np.log2(1.0 + table[:, 2]) * 2)
    _, place = np.unique(keys, return_inverse=True)
    count = np.bincount(place, table[:, 0]).astype(np.float64)
    means = [np.bincount(place, table[:, 0] * table[:, i]) / count for i in range(1, 6)]
    return Steps(count, *means)


def schedule(
    computed: npt.ArrayLike,
    prompt: npt.ArrayLike,
    output: npt.ArrayLike,
    capacity: Capacity,
    *,
    num_begun: int = 0,
    had: npt.ArrayLike = (),
) -> Steps:
    """The steps for these requests, in this order.

    Args:
        computed: prompt tokens to compute, those from the prefix cache not counted; shape (n,).
        prompt: all of them, as they take room in the cache; shape (n,).
        output: tokens to generate, 0 for none; shape (n,).
        num_begun: so many at the beginning are decoding already, and have `had` tokens each.

    Costs some microseconds a request.
    """
    to_compute = np.maximum(np.rint(np.asarray(computed, np.float64)), 1).astype(int).tolist()
    whole = np.maximum(np.rint(np.asarray(prompt, np.float64)), 1).astype(int).tolist()
    wanted = np.maximum(np.rint(np.asarray(output, np.float64)), 0).astype(int).tolist()
    begun = np.asarray(had, np.float64).astype(int).tolist()
    rows: list[tuple[float, float, float, float, float, float]] = []
    ends: list[tuple[int, int]] = []  # a heap: the step of the last token, the request
    decoding: dict[int, tuple[int, int]] = {}  # as begun: tokens held then, at which step
    prefilling: deque[tuple[int, int]] = deque()  # request, tokens still to compute
    waiting = deque(range(num_begun, len(wanted)))
    room = capacity.kv_cache_tokens
    free = int(_WATERMARK * room)
    step, context, held, backlog = 0, 0, 0, 0
    for number in range(num_begun):
        left = max(wanted[number] - begun[number], 1)
        heapq.heappush(ends, (left, number))
        whole[number] += begun[number]
        wanted[number] = left + 1
        decoding[number] = (whole[number], 0)
        context += whole[number]
    while decoding or prefilling or waiting:
        while len(decoding) > 1 and context + held + _HALF_BLOCK * len(decoding) > room:
            # The cache is full: the latest gives its place back, and is computed anew.
            number, (tokens, since) = decoding.popitem()
            context -= tokens + step - since
            wanted[number] -= tokens + step - since - whole[number]
            whole[number] = tokens + step - since
            to_compute[number] = whole[number] // 2  # the rest is still in the prefix cache
            waiting.appendleft(number)
        started = 0
        budget = max(capacity.max_num_batched_tokens - len(decoding), 1)
        # No more is taken in than the next step can begin.
        while waiting and backlog < budget:
            number = waiting[0]
            num = len(decoding) + len(prefilling)
            if num and (
                num >= capacity.max_num_seqs
                or context + held + whole[number] + _HALF_BLOCK * (1 + num) > room - free
            ):
                break
            waiting.popleft()
            prefilling.append((number, to_compute[number]))
            backlog += to_compute[number]
            held += whole[number]
            started += 1
        running = len(decoding)
        if not prefilling:
            leap = max(ends[0][0] - step, 1)
            if running > 1:
                leap = min(leap, max((room - context) // running - _HALF_BLOCK, 1))
            rows.append((leap, running, 0, 0, context + running * (leap - 1) / 2, 0))
            step += leap
            context += running * leap
        else:
            left, attended, ready = budget, 0.0, []
            while prefilling and left > 0:
                number, todo = prefilling.popleft()
                take = min(todo, left)
                attended += take * (whole[number] - todo + take / 2)
                left -= take
                backlog -= take
                if take < todo:
                    prefilling.appendleft((number, todo - take))
                else:
                    ready.append(number)
            rows.append((1, running, budget - left, attended, context, started))
            step += 1
            context += running
            for number in ready:
                held -= whole[number]
                if wanted[number] > 1:
                    heapq.heappush(ends, (step + wanted[number] - 1, number))
                    decoding[number] = (whole[number] + 1, step)
                    context += whole[number] + 1
        while ends and ends[0][0] <= step:
            end, number = heapq.heappop(ends)
            known = decoding.get(number)
            # One that gave its place back has an older end as well.
            if known is not None and known[1] + wanted[number] - 1 <= end:
                del decoding[number]
                context -= known[0] + step - known[1]
    return condensed(rows)
