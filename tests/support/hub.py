"""A model hub in which every model is there, over real HTTP; it can be away, refuse or hang."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from support.http_server import HttpServer

Mood = Literal["well", "refusing", "hanging", "gated"]


@dataclass
class HubStub(HttpServer):
    """`files`: of every model, by name. `mood`: how it answers from now on;
    gated: files only for those with a token. `paths`: what was asked
    for. It refuses connections until `start`."""

    files: Mapping[str, bytes] = field(default_factory=lambda: {"config.json": b"{}"})
    mood: Mood = "well"
    paths: list[str] = field(default_factory=list)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/api/models/{name:path}/revision/{revision}", self._revision),
                Route("/api/models/{name:path}/tree/{revision}", self._tree),
                Route("/{name:path}/resolve/{revision}/{file}", self._file),
            ]
        )

    def environment(self, cache: Path) -> dict[str, str]:
        """What sends a process to this hub, with this folder as the local cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    @property
    def _commit(self) -> str:
        return _digest(b"".join(self.files.values()))

    async def _refusal(self, request: Request) -> Response | None:
        self.paths.append(request.url.path)
        while self.mood == "hanging":  # noqa: ASYNC110 - it is set in another thread
            await asyncio.sleep(0.05)
        return Response("away", 503) if self.mood == "refusing" else None

    async def _revision(self, request: Request) -> Response:
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        name = request.path_params["name"]
        siblings = [{"rfilename": file, "size": len(self.files[file])} for file in self.files]
        gated = "manual" if self.mood == "gated" else False
        return JSONResponse(
            {
                "id": name,
                "modelId": name,
                "sha": self._commit,
                "siblings": siblings,
                "gated": gated,
            }
        )

    async def _tree(self, request: Request) -> Response:
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        return JSONResponse(
            [
                {"type": "file", "oid": _digest(content), "size": len(content), "path": name}
                for name, content in self.files.items()
            ]
        )

    async def _file(self, request: Request) -> Response:
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        if self.mood == "gated" and "authorization" not in request.headers:
            return Response("Access is restricted", 401, {"x-error-code": "GatedRepo"})
        content = self.files.get(request.path_params["file"])
        if content is None:
            return Response("Entry not found", 404, {"x-error-code": "EntryNotFound"})
        headers = {"etag": f'"{_digest(content)}"', "x-repo-commit": self._commit}
        return Response(content, 200, headers, media_type="application/octet-stream")


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
