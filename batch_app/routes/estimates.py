"""Estimates without a batch, and what they rest on."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from batch_app.core import FilePurpose
from batch_app.dry_run import DryRun
from batch_app.errors import BadRequest, NotFound
from batch_app.files import IncomingFolder
from batch_app.incoming import Incoming, UploadServices, receive, under_way
from batch_app.keys import Caller
from batch_app.routes.answers import form_schema, json_answer, json_schema, refusals
from batch_app.routes.bodies import is_json, read_json
from batch_app.routes.openai_files import checked_file_id
from batch_app.routes.services import Services, caller, services
from batch_app.shared_files import fetch_input
from batch_app.wire.estimates import (
    BenchmarkListBody,
    DryRunBody,
    EstimateWish,
    benchmark_list_body,
    dry_run_body,
)

router = APIRouter(tags=["estimates"])

MAX_LIMIT = 1000
DEFAULT_LIMIT = 100
_FORM = form_schema(
    {
        "file": {"type": "string", "format": "binary", "description": "As for a batch."},
        "model": {
            "type": "string",
            "description": "A model of GET /v1/models, or an alias. Without: each of them.",
        },
    },
    ["file"],
)
_FORM["requestBody"]["content"] |= json_schema(EstimateWish)


class EstimateUpload(Incoming[DryRun]):
    """A form with a file that is looked at, and gone again."""

    def __init__(self, own: Services, uploads: UploadServices) -> None:
        super().__init__(uploads)
        self._own = own

    def _accept(self) -> DryRun:
        model = self._form.fields.get("model", "").strip()
        return self._own.dry_runs.of(self._path, self._folder, model or None)


@router.post(
    "/v1/estimate",
    response_model=DryRunBody,
    responses=refusals(400, 404, 413, 415, 503, 507),
    openapi_extra=_FORM,
)
async def estimate(request: Request) -> Response:
    """A dry run: which lines would fail, and how long the others would take on each model."""
    own = services(request)
    uploads = own.for_uploads(caller(request))
    if is_json(request):
        wish, _ = await read_json(request, EstimateWish)
        with under_way(uploads):  # to look at a file costs as much as to take one in
            found = await to_thread.run_sync(
                _of_file, own, uploads.caller, wish, limiter=uploads.limiter
            )
    else:
        upload = EstimateUpload(own, uploads)
        found = await receive(upload, dict(request.headers), request.stream())
    return json_answer(dry_run_body(found))


def _of_file(own: Services, asks: Caller, wish: EstimateWish) -> DryRun:
    file = own.store.get_file(checked_file_id(wish.input_file_id), seen_by=asks)
    if file.purpose is not FilePurpose.BATCH:
        raise BadRequest(
            f"File {file.id} has the purpose {file.purpose.value!r}; an estimate needs one of the "
            'purpose "batch".',
            param="input_file_id",
        )
    with IncomingFolder(own.data) as folder:
        try:
            path = fetch_input(own.data, file.id)
            return own.dry_runs.of(path, folder, wish.model or None)
        except FileNotFoundError:
            raise NotFound(f"No such file: {file.id}", param="input_file_id") from None


@router.get("/v1/benchmarks", response_model=BenchmarkListBody, responses=refusals(400, 404))
def list_benchmarks(
    request: Request,
    model: str | None = Query(None, description="Only of this model, or alias."),
    limit: int = Query(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT),
) -> Response:
    """What was measured: the records that estimates rest on, newest first. They are of everybody's
    batches: with API keys, the scope `admin` is needed."""
    own = services(request)
    name = own.registry.get(model).name if model is not None else None
    return json_answer(benchmark_list_body(own.benchmarks.all(name), limit))
