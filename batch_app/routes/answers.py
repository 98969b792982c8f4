"""What the routes' answers have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from batch_app.wire.errors import ErrorBody

JSONL = "application/jsonl"
REFERENCE = "#/components/schemas/{model}"


def json_answer(body: BaseModel) -> Response:
    """A 200 with this body; pydantic writes it faster than FastAPI would on its own."""
    return Response(body.model_dump_json(), media_type="application/json")


def refusals(*statuses: int, **models: Any) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route for /openapi.json. `on_400=…` names another body than the usual."""
    return {status: {"model": models.get(f"on_{status}", ErrorBody)} for status in statuses}


def a_part_of(what: str) -> dict[int | str, dict[str, Any]]:
    """What a route that answers `Range` declares beside the whole: a part, and no such part."""
    part: dict[str, Any] = {"schema": {"type": "string"}}
    return {
        206: {
            "description": f"The ranges of {what} that the request's `Range` names.",
            "content": {JSONL: part, "multipart/byteranges": part},
        },
        304: {"description": "`If-None-Match` or `If-Modified-Since` names what is still there."},
        416: {
            "model": ErrorBody,
            "description": "The range is beyond the end, which `content-range` tells.",
        },
    }


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A JSON body in /openapi.json; `REQUEST_BODIES` of the dialect has to have the model."""
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}


def form_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """The multipart body of a route for /openapi.json."""
    schema = {"type": "object", "required": required, "properties": properties}
    content = {"multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}
