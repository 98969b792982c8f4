"""The recording of a run: what is kept of it for the forecasts to come. Pure; memory stays flat."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from batch_app.forecast.measurement import MeasuredGroup, Reading, StepBin
from batch_app.forecast.workload import LEVELS

#: So many groups at most; others join the nearest.
_MOST_GROUPS = 120
#: Different lengths that are kept exactly; beyond, they are rounded to 1/64 of their size.
_EXACT_UP_TO = 256
_MOST_BINS = 40


@dataclass(slots=True)
class _Group:
    lengths: Counter[int] = field(default_factory=Counter)  # requests by rounded output tokens
    num: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    limit_tokens: int = 0
    num_cut: int = 0


@dataclass(slots=True)
class _Bin:
    num_steps: float = 0.0
    seconds: float = 0.0
    decode_tokens: float = 0.0
    prefill_tokens: float = 0.0
    context_tokens: float = 0.0


class Recording:
    """Collects what finishes and what the engine says of itself.

    Feed it `finish` for every request that the engine answered, and `read` about once a second.
    `reset` it when the engine was started anew: its counters begin at 0 again.
    """

    def __init__(self, kv_cache_tokens: int | None = None) -> None:
        """`kv_cache_tokens`: what the engine's cache holds, to which `kv_cache_usage` refers."""
        self._kv_cache_tokens = kv_cache_tokens
        self._groups: dict[tuple[str, int, int], _Group] = {}
        self._prompts: Counter[int] = Counter()
        #: Of the prompts' tokens, those that came from the prefix cache.
        self.cached_tokens = 0
        self._last: Reading | None = None
        self._bins: dict[tuple[int, int], _Bin] = {}

    def finish(
        self,
        endpoint: str,
        max_tokens: int | None,
        *,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int = 0,
        num: int = 1,
    ) -> None:
        """A request was answered with a response. `max_tokens`: None or 0 where it sets none."""
        group = self._group(endpoint, max_tokens or 0, prompt_tokens)
        group.lengths[_rounded(output_tokens)] += num
        group.num += num
        group.output_tokens += num * output_tokens
        group.prompt_tokens += num * prompt_tokens
        group.limit_tokens += num * (max_tokens or 0)
        if max_tokens and output_tokens >= max_tokens:
            group.num_cut += num
        self._prompts[_rounded(prompt_tokens)] += num
        self.cached_tokens += num * cached_tokens

    def read(self, reading: Reading) -> None:
        """What the engine says now."""
        last, self._last = self._last, reading
        if last is None:
            return
        seconds = reading.at_s - last.at_s
        decode = reading.generation_tokens_total - last.generation_tokens_total
        prefill = (
            reading.prompt_tokens_total
            - last.prompt_tokens_total
            - (reading.cached_tokens_total - last.cached_tokens_total)
        )
        if seconds <= 0 or decode < 0 or prefill < 0 or decode + prefill <= 0:
            return
        running = max((reading.num_running + last.num_running) / 2, 1.0)
        if reading.steps_total is not None and last.steps_total is not None:
            steps = reading.steps_total - last.steps_total
        else:
            steps = decode / running
        if steps <= 0:
            return
        key = (round(3 * math.log2(running)), round(1.5 * math.log2(1.0 + prefill / steps)))
        if key not in self._bins and len(self._bins) >= _MOST_BINS:
            key = min(self._bins, key=lambda known: math.dist(known, key))
        one = self._bins.setdefault(key, _Bin())
        one.num_steps += steps
        one.seconds += seconds
        one.decode_tokens += decode
        one.prefill_tokens += prefill
        if reading.kv_cache_usage is not None and self._kv_cache_tokens:
            usage = (reading.kv_cache_usage + (last.kv_cache_usage or 0.0)) / 2
            one.context_tokens += usage * self._kv_cache_tokens * steps

    def reset(self) -> None:
        """The next reading begins a new row of counters."""
        self._last = None

    @property
    def groups(self) -> tuple[MeasuredGroup, ...]:
        """The answers by endpoint and limit."""
        return tuple(
            MeasuredGroup(
                endpoint=endpoint,
                max_tokens=group.limit_tokens / group.num if limit else None,
                num_requests=group.num,
                mean_output_tokens=group.output_tokens / group.num,
                output_quantiles=_quantiles(group.lengths),
                mean_prompt_tokens=group.prompt_tokens / group.num,
                num_cut=group.num_cut,
            )
            for (endpoint, limit, _), group in sorted(self._groups.items())
        )

    @property
    def steps(self) -> tuple[StepBin, ...]:
        """Sums over what passed between readings, by requests and prompt tokens a step."""
        has_context = bool(self._kv_cache_tokens)
        return tuple(
            StepBin(
                num_steps=one.num_steps,
                seconds=one.seconds,
                decode_tokens=one.decode_tokens,
                prefill_tokens=one.prefill_tokens,
                context_tokens=one.context_tokens if has_context else None,
            )
            for _, one in sorted(self._bins.items())
        )

    @property
    def prompt_quantiles(self) -> tuple[float, ...]:
        """At `workload.LEVELS`; empty before the first request."""
        return _quantiles(self._prompts)

    @property
    def output_quantiles(self) -> tuple[float, ...]:
        """At `workload.LEVELS`; empty before the first request."""
        lengths: Counter[int] = Counter()
        for group in self._groups.values():
            lengths.update(group.lengths)
        return _quantiles(lengths)

    def _group(self, endpoint: str, limit: int, prompt_tokens: int) -> _Group:
        """Where such answers are counted: limits within an eighth belong together, and prompts
        within the half of an octave, as long prompts get other answers than short ones."""
        step = 0 if limit == 0 else 1 + round(6 * math.log2(limit))
        size = round(2 * math.log2(max(prompt_tokens, 1)))
        key = (endpoint, step, size)
        if key not in self._groups and len(self._groups) >= _MOST_GROUPS:
            near = [known for known in self._groups if known[0] == endpoint]
            key = min(
                near or self._groups,
                key=lambda known: 10 * abs(known[1] - step) + abs(known[2] - size),
            )
        return self._groups.setdefault(key, _Group())


def _rounded(tokens: int) -> int:
    """Exact up to a size, then with 64 values an octave, so that few different ones are kept."""
    if tokens <= _EXACT_UP_TO:
        return tokens
    grain: int = 1 << max(tokens.bit_length() - 7, 0)
    return round(tokens / grain) * grain


def _quantiles(counts: Counter[int]) -> tuple[float, ...]:
    if not counts:
        return ()
    values = np.array(sorted(counts), dtype=np.float64)
    upto = np.cumsum([counts[int(value)] for value in values])
    places = np.searchsorted(upto, np.array(LEVELS) * upto[-1], side="left")
    return tuple(values[np.minimum(places, len(values) - 1)].tolist())
