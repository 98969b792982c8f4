"""A server that speaks OpenAI's API as vLLM's does: over real HTTP, and failing as it is told.

Its answer to a request is the last message (or prompt) said back, and its tokens are words.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from batch_app.core import Endpoint
from support.waiting import wait_for

#: What a request meets; None: an answer like any other.
Fault = Callable[[Request], Awaitable[Response | None]]


class Broken(Response):
    """Promises more than it sends; then the connection is closed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"1000"), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"id": ', "more_body": False})


def error(status: int, message: str = "No.", **headers: str) -> JSONResponse:
    content = {"error": {"message": message, "type": "X", "param": None, "code": status}}
    return JSONResponse(content, status, {name.replace("_", "-"): v for name, v in headers.items()})


def always(make: Callable[[], Response]) -> Fault:
    async def answer(_: Request) -> Response:
        return make()

    return answer


def for_word(word: str, make: Callable[[], Response]) -> Fault:
    """Only requests with this word meet it."""

    async def answer(request: Request) -> Response | None:
        return make() if word.encode() in await request.body() else None

    return answer


@dataclass
class ModelServerStub:
    """`faults`: what the next requests meet, one each; then `fault`, where there is one.

    `bodies`, `headers`: of the requests to a model, as they came. `num_broken_off`: requests whose
    client was gone before the answer.
    """

    model: str = "served-name"
    api_key: str = ""
    step_s: float = 0.005
    #: More at a time are refused with 429.
    most: int = 10_000
    faults: list[Fault] = field(default_factory=list)
    fault: Fault | None = None
    look_fault: Fault | None = None
    indent: int | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_broken_off: int = 0
    most_at_once: int = 0
    _at_once: int = 0

    def __post_init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))  # bound and not listening: refuses until `start`
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/version", self._version),
                *(Route(path, self._answer, methods=["POST"]) for path in Endpoint),
            ],
            exception_handlers={HTTPException: self._refuse},
        )
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off")
        server = self._server = uvicorn.Server(config)
        run = server.serve(sockets=[self._socket])
        self._thread = threading.Thread(target=lambda: asyncio.run(run), daemon=True)
        self._thread.start()
        wait_for(lambda: server.started, timeout_s=60, what="the server listens")

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(timeout=30)
        self._socket.close()

    def prompts(self) -> list[str]:
        """What was asked, in the order in which it came."""
        return [_prompt(body) for body in self.bodies]

    async def _refuse(self, _: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        return error(problem.status_code, str(problem.detail))

    def _check_key(self, request: Request) -> None:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise HTTPException(401, "Unauthorized")

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": "1.2.3"})

    async def _models(self, request: Request) -> Response:
        if self.look_fault is not None and (met := await self.look_fault(request)) is not None:
            return met
        self._check_key(request)
        card = {"id": self.model, "object": "model", "owned_by": "stub", "max_model_len": 4096}
        return JSONResponse({"object": "list", "data": [card]})

    async def _answer(self, request: Request) -> Response:
        self._check_key(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer_one(request)
        finally:
            self._at_once -= 1

    async def _answer_one(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw)
            said = _prompt(body)
        except (ValueError, KeyError, TypeError, IndexError):
            return error(400, "The body can't be understood.")
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self._at_once > self.most:
            return error(429, "Too many requests.", retry_after="0.05")
        fault = self.faults.pop(0) if self.faults else self.fault
        if fault is not None and (met := await fault(request)) is not None:
            return met
        if body["model"] != self.model:
            return error(404, f"The model `{body['model']}` does not exist.")
        words = said.split()
        tokens = body.get("max_tokens", 16)
        num_steps = tokens if body.get("ignore_eos") else min(tokens, len(words))
        for _ in range(num_steps):
            await asyncio.sleep(self.step_s)
            if await request.is_disconnected():
                self.num_broken_off += 1
                return Response(status_code=499)
        answer = {
            "id": f"cmpl-{len(self.bodies)}",
            "created": 1,
            "model": body["model"],
            **_content(request.url.path, " ".join(words[:tokens])),
            "usage": {
                "prompt_tokens": len(words),
                "completion_tokens": num_steps,
                "total_tokens": len(words) + num_steps,
                "prompt_tokens_details": {"cached_tokens": 1},
            },
        }
        return Response(json.dumps(answer, indent=self.indent), media_type="application/json")


def _prompt(body: dict[str, Any]) -> str:
    for name in ("prompt", "input", "query", "text_1"):
        if name in body:
            return str(body[name])
    return str(body["messages"][-1]["content"])


def _content(endpoint: str, text: str) -> dict[str, Any]:
    """What an answer to this endpoint has beside its head and its usage."""
    if endpoint == Endpoint.CHAT_COMPLETIONS:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return {"object": "chat.completion", "choices": [choice]}
    if endpoint == Endpoint.COMPLETIONS:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        return {"object": "text_completion", "choices": [choice]}
    if endpoint == Endpoint.RESPONSES:
        part = {"type": "output_text", "text": text}
        output = [{"type": "message", "role": "assistant", "content": [part]}]
        return {"object": "response", "status": "completed", "error": None, "output": output}
    if endpoint == Endpoint.RERANK:
        return {"results": [{"index": 0, "relevance_score": 0.5}]}
    if endpoint == Endpoint.SCORE:
        return {"object": "list", "data": [{"index": 0, "object": "score", "score": 0.5}]}
    return {"object": "list", "data": [{"index": 0, "object": "embedding", "embedding": [0.5]}]}


@contextmanager
def serving(**fields: Any) -> Iterator[ModelServerStub]:
    """A server on a free port of 127.0.0.1, until the end of the block."""
    server = ModelServerStub(**fields)
    server.start()
    try:
        yield server
    finally:
        server.stop()
