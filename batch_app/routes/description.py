"""What /openapi.json says beyond what the routes declare: refusals, bodies, and keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from batch_app.access import Access
from batch_app.routes.answers import REFERENCE
from batch_app.routes.authentication import SAFE_METHODS, is_open, scopes_for
from batch_app.wire.estimates import EstimateWish
from batch_app.wire.openai import REQUEST_BODIES

SECURITY_SCHEME = "apiKey"
#: What may become of any request before a route sees it; the second, of those with a body.
ANYWHERE = {
    "401": "An API key is asked for, and none that opens anything was sent.",
    "403": "The key lacks a scope, or the request came under another name or from another origin.",
    "503": "The database does not answer.",
}
WITH_BODY = {
    "408": "The body did not arrive in time.",
    "415": "The body is encoded.",
    "429": "Too many batches or uploads under way; see `retry-after` and `x-should-retry`.",
}
_REFUSAL = {"application/json": {"schema": {"$ref": REFERENCE.format(model="ErrorBody")}}}


def describe(app: FastAPI, access: Access) -> None:
    """Have /openapi.json say what is true, at the time it is asked for."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = generate()
            _complete(app.openapi_schema)
        _require_keys(app.openapi_schema, access.is_required_here() is True)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any]) -> None:
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            # A bad parameter is a 400 in our shape, never a 422.
            if "HTTPValidationError" in str(responses.get("422", {})):
                del responses["422"]
            added = {} if is_open(path) else ANYWHERE
            if method.upper() not in SAFE_METHODS:
                added = added | WITH_BODY
            for status, description in {"403": ANYWHERE["403"], **added}.items():
                refusal = {"description": description, "content": _REFUSAL}
                responses[status] = {**refusal, **responses.get(status, {})}
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    _, bodies = models_json_schema(
        [(model, "validation") for model in (*REQUEST_BODIES, EstimateWish)], ref_template=REFERENCE
    )
    schema["components"]["schemas"] |= bodies["$defs"]
    schema["components"]["securitySchemes"] = {
        SECURITY_SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "A key of `vllm-batch keys create`. Each operation names the scopes "
            "that it needs under `x-required-scopes`.",
        }
    }


def _require_keys(schema: dict[str, Any], are_required: bool) -> None:
    """Without keys made, none is asked for: then the requirement is met without one, too."""
    requirement: list[dict[str, list[str]]] = [{SECURITY_SCHEME: []}]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            if is_open(path):
                operation["security"] = []
                continue
            operation["security"] = requirement if are_required else [*requirement, {}]
            operation["x-required-scopes"] = list(scopes_for(method.upper(), path))
