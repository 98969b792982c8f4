"""A model hub with one small model, over real HTTP, which can be away, refuse or hang."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from support.http_server import HttpServer

Mood = Literal["well", "refusing", "hanging"]


@dataclass
class HubStub(HttpServer):
    """`files`: of the model, by name. `mood`: how it answers from now on."""

    model: str = "example/tried"
    files: Mapping[str, bytes] = field(default_factory=lambda: {"config.json": b"{}"})
    mood: Mood = "well"
    num_requests: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/models/{name:path}/revision/{revision}", self._revision),
                Route("/{name:path}/resolve/{revision}/{file}", self._file),
            ]
        )

    def environment(self) -> dict[str, str]:
        """What sends a process to this hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    @property
    def _commit(self) -> str:
        return hashlib.sha1(b"".join(self.files.values())).hexdigest()

    async def _refusal(self) -> Response | None:
        self.num_requests += 1
        while self.mood == "hanging":  # noqa: ASYNC110 - it is set in another thread
            await asyncio.sleep(0.05)
        return Response("away", 503) if self.mood == "refusing" else None

    async def _revision(self, request: Request) -> Response:
        if (refusal := await self._refusal()) is not None:
            return refusal
        if request.path_params["name"] != self.model:
            return JSONResponse({"error": "Repository not found"}, 404)
        siblings = [{"rfilename": name} for name in self.files]
        return JSONResponse(
            {"id": self.model, "modelId": self.model, "sha": self._commit, "siblings": siblings}
        )

    async def _file(self, request: Request) -> Response:
        if (refusal := await self._refusal()) is not None:
            return refusal
        content = self.files.get(request.path_params["file"])
        if content is None or request.path_params["name"] != self.model:
            return Response("Entry not found", 404, {"x-error-code": "EntryNotFound"})
        headers = {"etag": f'"{hashlib.sha1(content).hexdigest()}"', "x-repo-commit": self._commit}
        return Response(content, 200, headers, media_type="application/octet-stream")


@contextmanager
def serving_hub(**fields: object) -> Iterator[HubStub]:
    """A hub on a free port of 127.0.0.1, until the end of the block."""
    hub = HubStub(**fields)  # type: ignore[arg-type]
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
