"""How bytes reach a client: whole files with ranges and validators, and gzip where it is asked for.

A file of the native routes goes out as it is, with its length, unless the client accepts gzip and
asks for no range. A file of the OpenAI dialect always does: OpenAI sends those uncompressed, and
clients in between (proxies that put a bucket before this server) take the bytes for the file's.
What is compressed has an entity tag of its own, so that a range can never be glued to it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from batch_app.routes.errors import json_response
from batch_app.wire.errors import error_body

#: Pieces are read, or compressed, in a thread: large enough that the switch costs nothing.
BLOCK_BYTES = 1 << 20
#: The fastest: a client on the same machine would otherwise wait for the compression.
GZIP_LEVEL = 1
#: Of what may be compressed on its way, for caches.
VARIES = {"vary": "Accept-Encoding"}
_GZIP_WINDOW = 31  # zlib's way to say "the largest window, in a gzip file"


class FileDownload(FileResponse):
    """A file that never changes, to GET or HEAD.

    Answers `Range` (also with `If-Range`), `If-None-Match`, `If-Modified-Since` and, with
    `may_compress`, `Accept-Encoding: gzip`; the last one only where no range is asked for. A range
    beyond the file's end is a 416 in the shape of every refusal, with `content-range`; a Range
    header that means nothing is as good as none (RFC 9110, 14.2).
    """

    chunk_size = BLOCK_BYTES

    def __init__(
        self,
        path: Path,
        stat_result: os.stat_result,
        headers: dict[str, str],
        media_type: str,
        *,
        may_compress: bool,
    ) -> None:
        super().__init__(
            path,
            headers=headers | (VARIES if may_compress else {}),
            media_type=media_type,
            stat_result=stat_result,
        )
        self._may_compress = may_compress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope)
        answer = self._other_answer(asked, scope["method"])
        if answer is not None:
            await answer(scope, receive, send)
            return
        refusal: Message | None = None

        async def send_unless_refused(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                refusal = message
            if refusal is None:
                await send(message)

        await super().__call__(scope, receive, send_unless_refused)
        if refusal is None:
            return
        if refusal["status"] == 400:
            headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
            await super().__call__({**scope, "headers": headers}, receive, send)
            return
        size = self.headers["content-length"]
        body = error_body(
            416,
            f"The file has {size} bytes: the range that was asked for is not in it.",
            code="range_not_satisfiable",
            param="Range",
        )
        await json_response(body, 416, {"content-range": f"bytes */{size}"})(scope, receive, send)

    def _other_answer(self, asked: Headers, method: str) -> Response | None:
        """What is sent instead of the bytes as they are; None where it is them."""
        etag = self.headers["etag"]
        gzip_etag = f'{etag[:-1]}-gzip"'
        compresses = self._may_compress and accepts_gzip(asked) and "range" not in asked
        etags = {etag, gzip_etag} if self._may_compress else {etag}
        if is_known(asked, etags, self.headers["last-modified"]):
            kept = kept_headers(self.headers)
            kept["etag"] = gzip_etag if compresses else etag
            return Response(status_code=304, headers=kept)
        if not compresses:
            return None
        headers = {
            name: value
            for name, value in self.headers.items()
            if name not in ("content-length", "accept-ranges", "content-type")
        }
        headers |= {"etag": gzip_etag, "content-encoding": "gzip"}
        blocks = () if method == "HEAD" else gzipped(blocks_of_file(Path(self.path)))
        return StreamingResponse(blocks, headers=headers, media_type=self.media_type)


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a file that a 304 repeats, where it has them."""
    return {name: headers[name] for name in ("last-modified", "vary", "etag") if name in headers}


def is_known(asked: Headers, etags: set[str], last_modified: str) -> bool:
    """Whether the client has it already, by what it says with its request."""
    named = asked.get("if-none-match")
    if named is not None:
        tags = {tag.strip().removeprefix("W/") for tag in named.split(",")}
        return "*" in tags or bool(tags & etags)
    since = asked.get("if-modified-since")
    if since is None:
        return False
    try:
        return parsedate_to_datetime(last_modified) <= parsedate_to_datetime(since)
    except (ValueError, TypeError):  # not a date, or one without a zone
        return False


def streamed(
    request: Request, blocks: Iterable[bytes], headers: dict[str, str], media_type: str
) -> Response:
    """An answer of unknown length, compressed where the client accepts that."""
    headers = headers | VARIES
    if accepts_gzip(request.headers):
        headers["content-encoding"] = "gzip"
        blocks = gzipped(blocks)
    if request.method == "HEAD":
        blocks = ()
    return StreamingResponse(blocks, headers=headers, media_type=media_type)


def accepts_gzip(asked: Headers) -> bool:
    """Whether gzip is named in `Accept-Encoding`, and not wanted less than identity."""
    weights: dict[str, float] = {}
    for item in asked.get("accept-encoding", "").split(","):
        coding, *parameters = (part.strip().lower() for part in item.split(";"))
        weight = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        weights[coding] = weight
    gzip = weights.get("gzip", weights.get("x-gzip", 0.0))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def blocks_of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def gzipped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes as one gzip file, always the same one for the same blocks."""
    compressor = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
    for block in blocks:
        piece = compressor.compress(block)
        if piece:
            yield piece
    yield compressor.flush()
