"""JSON bodies: how they are read, within bounds, and told apart from forms."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from batch_app.errors import BadRequest, TooLarge, UnsupportedMedia

MAX_JSON_BYTES = 1 << 20

T = TypeVar("T", bound=BaseModel)


def is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    return kind == "application/json"


async def read_json(request: Request, model: type[T]) -> tuple[T, bytes]:
    """The body as this model, and its raw bytes.

    Raises:
        UnsupportedMedia: it isn't sent as JSON.
        TooLarge: it has more than `MAX_JSON_BYTES`.
        BadRequest: it isn't JSON, or not of this shape; the message names the field.
    """
    if not is_json(request):
        raise UnsupportedMedia("Send the body as application/json.")
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_JSON_BYTES:
            raise TooLarge(f"The JSON body is larger than {MAX_JSON_BYTES} bytes.")
    try:
        return model.model_validate_json(bytes(raw)), bytes(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        message = f"{where}: {first['msg']}." if where else f"The body: {first['msg']}."
        missing = first["type"] == "missing"
        raise BadRequest(
            message,
            code="missing_required_parameter" if missing else "invalid_request",
            param=where,
        ) from None
