"""The body of every refusal, in both dialects: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from batch_app.core import LineError

#: What the OpenAI dialect calls the kinds of refusal; anything else from 500 on is `server_error`.
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
#: A refusal never lists more lines than this; `total` tells how many there are.
MAX_LISTED_LINES = 100


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class LineErrorBody(BaseModel):
    """`line` counts from 1; null when the error concerns the whole file."""

    model_config = ConfigDict(from_attributes=True)

    code: str
    line: int | None
    message: str
    param: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class BadLinesBody(ErrorBody):
    """A refused input file: its first bad lines, and how many there are in all."""

    errors: list[LineErrorBody]
    total: int


def error_type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> ErrorBody:
    return ErrorBody(
        error=ErrorDetail(message=message, type=error_type(status), param=param, code=code)
    )


def bad_lines_body(
    message: str, errors: tuple[LineError, ...], total: int, *, code: str, param: str | None
) -> BadLinesBody:
    return BadLinesBody(
        error=ErrorDetail(message=message, type=error_type(400), param=param, code=code),
        errors=[LineErrorBody.model_validate(error) for error in errors[:MAX_LISTED_LINES]],
        total=total,
    )
