"""The workload: what is to be run, as far as it can be known before. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.float64]

#: The shares at which a distribution is kept: denser at the upper end, where the work is.
LEVELS: tuple[float, ...] = (
    *(0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    *(0.85, 0.9, 0.95, 0.98, 0.99, 1.0),
)  # fmt: skip
#: More different limits in one workload are put together with their neighbours.
MOST_GROUPS = 12


def sketch(values: npt.ArrayLike) -> tuple[float, ...]:
    """The quantiles at `LEVELS`; empty for no values."""
    array = np.asarray(values, dtype=np.float64)
    return tuple(np.quantile(array, LEVELS).tolist()) if array.size else ()


def spread_out(quantiles: Sequence[float], num: int) -> Tokens:
    """`num` values, ascending, that have these quantiles at `LEVELS`; shape (num,)."""
    shares = (np.arange(num) + 0.5) / num
    return np.interp(shares, LEVELS, np.asarray(quantiles, dtype=np.float64))


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Requests to one endpoint that allow about the same number of output tokens.

    `max_tokens`: the most output tokens a request may get (their mean in the group), None where
    only the context ends it. `generates`: False for embeddings, scores and the like, which yield
    no tokens. `prompt_tokens`: the sum over the group, of what is computed only (no duplicates).
    `prompt_quantiles`: at `LEVELS`; empty where nothing but the sum is known. `spared_tokens`: of
    `prompt_tokens`, those that the prefix cache is expected to hold when they are needed, in the
    planned order. `prompt_error`: relative standard error of `prompt_tokens`, 0 where all requests
    were counted. `fixed_tokens`: True where the answer always takes all of `max_tokens`
    (`ignore_eos`, or `min_tokens` as large). `prompt_known`: False where nothing was counted; then
    what was measured stands in for `prompt_tokens` and `prompt_quantiles`.
    """

    num_requests: int
    endpoint: str = "/v1/chat/completions"
    max_tokens: float | None = None
    generates: bool = True
    prompt_tokens: float = 0.0
    prompt_quantiles: tuple[float, ...] = ()
    spared_tokens: float = 0.0
    prompt_error: float = 0.0
    fixed_tokens: bool = False
    prompt_known: bool = True

    @property
    def mean_prompt_tokens(self) -> float:
        return self.prompt_tokens / self.num_requests if self.num_requests else 0.0

    @property
    def spared_share(self) -> float:
        """Of its prompt tokens, the share that isn't computed; 0 to 1."""
        if self.prompt_tokens <= 0:
            return 0.0
        return min(max(self.spared_tokens / self.prompt_tokens, 0.0), 1.0)

    def scaled(self, num_requests: int) -> RequestGroup:
        """As many requests of the same kind."""
        factor = num_requests / self.num_requests if self.num_requests else 0.0
        return replace(
            self,
            num_requests=num_requests,
            prompt_tokens=self.prompt_tokens * factor,
            spared_tokens=self.spared_tokens * factor,
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """What one model has to do for a batch.

    `groups` stand in the order in which they run, as far as there is one. `longest_first`: whether
    the planner puts long answers first.
    """

    groups: tuple[RequestGroup, ...]
    longest_first: bool = True

    @property
    def num_requests(self) -> int:
        return sum(group.num_requests for group in self.groups)

    @property
    def prompt_tokens(self) -> float:
        return sum(group.prompt_tokens for group in self.groups)

    @property
    def spared_tokens(self) -> float:
        return sum(group.spared_tokens for group in self.groups)

    @property
    def prompt_error(self) -> float:
        """Relative standard error of `prompt_tokens`."""
        total = self.prompt_tokens
        if total <= 0:
            return 0.0
        squares = sum((group.prompt_error * group.prompt_tokens) ** 2 for group in self.groups)
        return float(squares**0.5 / total)

    @classmethod
    def of_requests(
        cls,
        *,
        endpoints: Sequence[str],
        endpoint_of: npt.NDArray[Any],
        max_tokens: npt.NDArray[Any],
        generating: Sequence[bool],
        prompt_tokens: npt.NDArray[Any],
        counted: npt.NDArray[Any] | None = None,
        spared_share: float | npt.NDArray[Any] = 0.0,
        fixed: npt.NDArray[Any] | None = None,
    ) -> tuple[Workload, npt.NDArray[np.int16]]:
        """The workload of these requests, and of each request the group it is in.

        Args:
            endpoints: their names; `endpoint_of` holds positions in it, shape (n,).
            generating: of each endpoint whether it yields tokens.
            max_tokens: shape (n,), 0 where a request sets none.
            prompt_tokens: of the counted requests, shape (len(counted),), or (n,) without
                `counted`.
            counted: the positions of a random sample of the requests; None: all were counted.
                A group without a counted request takes the mean of all.
            spared_share: of the prompt tokens, the share that the prefix cache spares; of all, or
                of each request, shape (n,).
            fixed: of each request whether its answer always takes all of `max_tokens`.

        Memory: about 40 bytes a request while it runs.
        """
        num = len(endpoint_of)
        fixed_of = np.zeros(num, bool) if fixed is None else np.asarray(fixed, bool)
        group_of = np.zeros(num, np.int16)
        sampled = np.arange(num) if counted is None else np.asarray(counted, np.int64)
        lengths = np.asarray(prompt_tokens, np.float64)
        shares = np.broadcast_to(np.asarray(spared_share, np.float64), (num,))
        groups: list[RequestGroup] = []
        limits = _merged_limits(np.asarray(max_tokens, np.float64))
        keys = np.asarray(endpoint_of, np.int64) * 2 + fixed_of
        overall = float(lengths.mean()) if lengths.size else 0.0
        members: list[tuple[int, float]] = []
        for key in np.unique(keys):
            for limit in np.unique(limits[keys == key]):
                inside = (keys == key) & (limits == limit)
                group_of[inside] = len(members)
                members.append((int(key), float(limit)))
        group_of_sampled = group_of[sampled]
        for number, (key, limit) in enumerate(members):
            inside = group_of == number
            size = int(inside.sum())
            here = lengths[group_of_sampled == number]
            mean = float(here.mean()) if here.size else overall
            error = 0.0
            if here.size < size:
                known = here if here.size > 1 else lengths
                spread = float(known.std() / known.mean()) if known.size and known.mean() else 1.0
                missing = 1.0 - here.size / size
                error = spread * (missing / max(here.size, 1)) ** 0.5
            total = mean * size
            groups.append(
                RequestGroup(
                    num_requests=size,
                    endpoint=endpoints[key // 2],
                    max_tokens=limit or None,
                    generates=generating[key // 2],
                    prompt_tokens=total,
                    prompt_quantiles=sketch(here if here.size else lengths),
                    spared_tokens=total * float(shares[inside].mean()),
                    prompt_error=error,
                    fixed_tokens=bool(key % 2),
                )
            )
        return cls(tuple(groups)), group_of


def _merged_limits(limits: Tokens) -> Tokens:
    """The limits, near ones replaced by their mean where there are too many different ones."""
    different = np.unique(limits)
    if len(different) <= MOST_GROUPS:
        return limits
    # A first step of an eighth of an octave, doubled until it is coarse enough.
    width = 0.125
    steps = np.zeros_like(limits)
    while True:
        steps = np.where(limits > 0, np.ceil(np.log2(np.maximum(limits, 1)) / width), -1)
        if len(np.unique(steps)) <= MOST_GROUPS:
            break
        width *= 2
    merged = np.zeros_like(limits)
    for step in np.unique(steps[steps >= 0]):
        inside = steps == step
        merged[inside] = np.round(limits[inside].mean(), 1)
    return merged
