"""What a batch asks for, model by model: the requests of an index as `forecast.Workload`s.

At first from the lines' bytes, which costs milliseconds; then from its prompts, counted
(`batch_app.counting`) in the background. Kept with the batch as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from batch_app.counting.count import BytesPerToken, PromptCounts, count_prompts
from batch_app.forecast.workload import RequestGroup, Workload
from batch_app.index import Index
from batch_app.lines import GENERATES
from batch_app.planner import Group, plan
from batch_app.registry import ModelRegistry
from batch_app.sparing import BLOCK_TOKENS, spared_shares

#: Seconds that counting a batch in the background may take.
COUNT_S = 120.0


@dataclass(frozen=True, slots=True)
class ModelWorkload:
    """What one model has to do for a batch.

    `num_requests` in the file, those that are only copied among them; `line_bytes` of the computed
    ones. `basis`, `num_counted`: of the prompt tokens, as `counting.PromptCounts`.
    `num_refused`: requests that the model's template refuses, among those looked at.
    """

    model: str
    workload: Workload
    num_requests: int
    line_bytes: int
    basis: str
    num_counted: int = 0
    num_refused: int = 0
    reason: str = ""

    @property
    def tokens_per_byte(self) -> float:
        return self.workload.prompt_tokens / self.line_bytes if self.line_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Planning:
    """How the worker will order requests, and with what; see `planner.plan` and `sparing`."""

    by_prefix: bool = True
    deduplicate: bool = True
    kv_cache_tokens: Mapping[str, int] | None = None
    usual_tokens: Mapping[str, int] | None = None
    block_tokens: int = BLOCK_TOKENS

    def groups(self, index: Index) -> Iterator[Group]:
        return plan(
            index,
            np.arange(len(index)),
            by_prefix=self.by_prefix,
            deduplicate=self.deduplicate,
            usual_tokens=dict(self.usual_tokens or {}),
        )


def quick_workloads(
    index: Index, planning: Planning, usual: Callable[[str], BytesPerToken]
) -> tuple[ModelWorkload, ...]:
    """From the bytes of the lines alone. `usual`: what a model's past runs had per token."""
    found = []
    for group in planning.groups(index):
        counts = tokens_from_bytes(index, group.numbers, usual(group.model))
        found.append(measured(index, group, counts, planning)[0])
    return tuple(found)


def counted_workloads(
    index: Index,
    input_path: Path,
    registry: ModelRegistry,
    planning: Planning,
    usual: Callable[[str], BytesPerToken],
    *,
    budget_s: float = COUNT_S,
) -> tuple[ModelWorkload, ...]:
    """From the prompts themselves; takes seconds. Raises ModelNotFound."""
    found = []
    for group in planning.groups(index):
        entry = registry.get(group.model)
        counts = count_prompts(
            index, group.numbers, input_path, entry, budget_s=budget_s, usual=usual(group.model)
        )
        found.append(measured(index, group, counts, planning)[0])
    return tuple(found)


def tokens_from_bytes(
    index: Index, numbers: npt.NDArray[np.int64], usual: BytesPerToken
) -> PromptCounts:
    """Prompt tokens by the length of the lines."""
    return usual.counts(index.records["length"][numbers].astype(np.int64))


def tokens_per_byte_of(part: ModelWorkload | None, usual: BytesPerToken) -> float:
    """Of this model's lines: as far as they were looked at, else as usual."""
    known = part.tokens_per_byte if part is not None else 0.0
    return known or 1.0 / usual.ratio


def workload_in_order(
    index: Index, group: Group, tokens_per_byte: float, planning: Planning
) -> tuple[Workload, npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """What is to run now; of each place in the order its group and its prompt tokens, roughly."""
    usual = BytesPerToken(1.0 / tokens_per_byte, learned=True)
    counts = tokens_from_bytes(index, group.numbers, usual)
    found, group_of = measured(index, group, counts, planning)
    return found.workload, group_of, counts.tokens


def measured(
    index: Index, group: Group, counts: PromptCounts, planning: Planning
) -> tuple[ModelWorkload, npt.NDArray[np.int16]]:
    """What this group asks for, its prompts so long; of each place in its order the group."""
    records = index.records[group.numbers]
    shares = spared_shares(
        index,
        group.numbers,
        counts.tokens,
        by_prefix=planning.by_prefix,
        kv_cache_tokens=(planning.kv_cache_tokens or {}).get(group.model),
        block_tokens=planning.block_tokens,
    )
    workload, group_of = Workload.of_requests(
        endpoints=index.endpoints,
        endpoint_of=records["endpoint"],
        max_tokens=records["max_tokens"],
        generating=[endpoint in GENERATES for endpoint in index.endpoints],
        prompt_tokens=counts.tokens,
        spared_share=shares,
        fixed=counts.fixed,
    )
    groups = tuple(_rounded(one, counts.relative_error) for one in workload.groups)
    workload = replace(workload, groups=groups, longest_first=planning.by_prefix)
    return (
        ModelWorkload(
            model=group.model,
            workload=workload,
            num_requests=len(group.numbers) + len(group.waiting) + len(group.answered),
            line_bytes=int(records["length"].sum(dtype=np.int64)),
            basis=counts.basis,
            num_counted=counts.num_counted,
            num_refused=len(counts.refused),
            reason=counts.reason,
        ),
        group_of,
    )


def _rounded(group: RequestGroup, error: float) -> RequestGroup:
    """As it is kept: nobody needs a hundredth of a token."""
    return replace(
        group,
        prompt_tokens=round(group.prompt_tokens, 1),
        spared_tokens=round(group.spared_tokens, 1),
        prompt_quantiles=tuple(round(one, 1) for one in group.prompt_quantiles),
        prompt_error=round(error, 5),
    )


# -- kept with the batch ---------------------------------------------------------------------------


def to_json(workloads: tuple[ModelWorkload, ...]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = msgspec.to_builtins(workloads)
    return kept


def from_json(kept: object) -> tuple[ModelWorkload, ...]:
    """Nothing of what an older or newer version wrote in another way."""
    try:
        return msgspec.convert(kept, type=tuple[ModelWorkload, ...])
    except msgspec.ValidationError:
        return ()
