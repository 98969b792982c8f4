"""The bodies of requests and answers, on their way to a server and back.

They pass as they are, byte for byte where that is possible. What is changed is said here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
import orjson

from batch_app.core import Endpoint
from batch_app.engine.base import EngineRequest, Outcome
from batch_app.engine.server_answers import error_body

#: The shortest request to each endpoint, to see whether it works.
SHORTEST: Mapping[str, Mapping[str, Any]] = {
    Endpoint.CHAT_COMPLETIONS: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    Endpoint.COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    Endpoint.RESPONSES: {"input": "Hi", "max_output_tokens": 16},
    Endpoint.EMBEDDINGS: {"input": "Hi"},
    Endpoint.SCORE: {"text_1": "Hi", "text_2": "Hi"},
    Endpoint.RERANK: {"query": "Hi", "documents": ["Hi"]},
}

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def refusal(request: EngineRequest) -> Outcome | None:
    """What isn't sent at all, in the words of the in-process engine."""
    if request.endpoint not in SHORTEST:
        return _refused(request.number, 404, f"There is no {request.endpoint} here", "url")
    with contextlib.suppress(msgspec.MsgspecError):
        fields = _fields(request.body)
        for name in ("stream", "background"):
            if bytes(fields.get(name, b"false")).strip() not in (b"false", b"null"):
                return _refused(request.number, 400, f"`{name}` cannot be true in a batch", name)
    return None


def _refused(number: int, status: int, message: str, param: str) -> Outcome:
    return Outcome(number, status, error_body(status, message, param))


def body_to_send(body: bytes, served_name: str, extra: Mapping[str, Any]) -> bytes:
    """The request with the server's name of the model; all else as it came."""
    try:
        fields = _fields(body)
    except msgspec.MsgspecError:
        return body  # the server says what is wrong with it
    for name, value in {"model": served_name, **extra}.items():
        fields[name] = msgspec.Raw(orjson.dumps(value))
    return msgspec.json.encode(fields)


def with_our_name(body: bytes, served_name: str, name: str) -> bytes:
    """The answer with the model under the name that the request said: what `body_to_send` put
    there is taken back. Another name (a version, say) stays, as does all else, byte for byte."""
    if served_name == name:
        return body
    with contextlib.suppress(msgspec.MsgspecError):
        fields = _fields(body)
        if "model" in fields and msgspec.json.decode(fields["model"]) == served_name:
            fields["model"] = msgspec.Raw(orjson.dumps(name))
            return msgspec.json.encode(fields)
    return body
