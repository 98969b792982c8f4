"""Lists that carry both dialects: the same page twice, each view under its own name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from batch_app.core import Batch
from batch_app.estimates import Estimate
from batch_app.wire.native import BatchBody, ModelBody, batch_body
from batch_app.wire.openai import OpenAIBatchBody, OpenAIModelBody, openai_batch_body


class BatchListBody(BaseModel):
    """A page of batches, newest first. `has_more`: ask again with `after=<last_id>`."""

    object: Literal["list"] = "list"
    data: list[OpenAIBatchBody]
    first_id: str | None
    last_id: str | None
    has_more: bool
    batches: list[BatchBody]
    count: int


class ModelListBody(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    object: Literal["list"] = "list"
    data: list[OpenAIModelBody]
    models: list[ModelBody]
    count: int


def batch_list_body(
    page: Sequence[Batch], estimates: Sequence[Estimate | None], has_more: bool
) -> BatchListBody:
    pairs = list(zip(page, estimates, strict=True))
    return BatchListBody(
        data=[openai_batch_body(batch, estimate) for batch, estimate in pairs],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
        batches=[batch_body(batch, estimate) for batch, estimate in pairs],
        count=len(pairs),
    )
