"""What `POST /v1/estimate` and `GET /v1/benchmarks` answer, the same in both dialects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from batch_app.benchmarks import BenchmarkRecord
from batch_app.dry_run import DryRun, ModelOutlook
from batch_app.wire.errors import LineErrorBody
from batch_app.wire.native import EstimateBody, estimate_body


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class EstimateWish(_Body):
    """The JSON body of `POST /v1/estimate`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    input_file_id: str
    model: str | None = None


class ModelEstimateBody(_Body):
    """What one model would make of the file.

    `estimate` is null where nothing was ever measured of it. `num_too_long` requests don't fit its
    context of `max_model_len` tokens, `num_refused` are refused by its chat template; of a sample,
    about so many. `lines`: the first hundred of these. `prompt_tokens_error`: one standard error,
    relative. `reason`: why its tokenizer could not be used.
    """

    model: str
    estimate: EstimateBody | None
    max_model_len: int | None
    num_too_long: int
    num_refused: int
    lines: list[int]
    prompt_tokens_error: float
    reason: str | None


class DryRunBody(_Body):
    """What would become of a file. With `num_errors`, a submission would be refused."""

    object: Literal["estimate"] = "estimate"
    num_requests: int
    num_errors: int
    errors: list[LineErrorBody]
    models: list[ModelEstimateBody]
    count: int


class BenchmarkListBody(_Body):
    """Benchmark records, newest first."""

    object: Literal["list"] = "list"
    benchmarks: list[BenchmarkRecord]
    count: int
    has_more: bool


def dry_run_body(found: DryRun) -> DryRunBody:
    return DryRunBody(
        num_requests=found.num_requests,
        num_errors=found.num_errors,
        errors=[LineErrorBody.model_validate(error) for error in found.errors],
        models=[_model_body(row) for row in found.models],
        count=len(found.models),
    )


def _model_body(row: ModelOutlook) -> ModelEstimateBody:
    return ModelEstimateBody(
        model=row.model,
        estimate=estimate_body(row.estimate),
        max_model_len=row.max_model_len,
        num_too_long=row.num_too_long,
        num_refused=row.num_refused,
        lines=list(row.lines),
        prompt_tokens_error=round(row.relative_error, 4),
        reason=row.reason or None,
    )


def benchmark_list_body(records: Sequence[BenchmarkRecord], limit: int) -> BenchmarkListBody:
    # The arguments may name paths of the machine; a batch's provenance has what may be shown.
    shown = [record.model_copy(update={"engine_args": None}) for record in records[:limit]]
    return BenchmarkListBody(
        benchmarks=shown,
        count=min(len(records), limit),
        has_more=len(records) > limit,
    )
