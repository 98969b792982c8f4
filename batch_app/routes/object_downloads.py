"""Files that lie in the object storage on their way to a client: by way of the data folder's copy,
streamed from the store, or by a link to it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from email.utils import format_datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from fastapi import Query, Request
from pydantic import BaseModel
from starlette.responses import RedirectResponse, Response, StreamingResponse

from batch_app.errors import Conflict
from batch_app.files import DataDir
from batch_app.objects import Objects
from batch_app.routes.answers import JSONL, json_answer
from batch_app.routes.errors import json_response
from batch_app.routes.services import Services
from batch_app.routes.transfer import (
    VARIES,
    FileDownload,
    accepts_gzip,
    gzipped,
    is_known,
    kept_headers,
)
from batch_app.wire.errors import error_body

Link = Literal["redirect", "json"]
LINK = Query(
    None,
    description="A short-lived link to the object storage instead of the bytes: `redirect` (307; "
    "the bytes where there are no links) or `json` (409 where there are none).",
)
TEMPORARY_REDIRECT = 307
_ONE_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*")


class DownloadLinkBody(BaseModel):
    """Whoever has the `url` reads the file until `expires_at` (Unix seconds), without a key."""

    url: str
    expires_at: int


#: Beside the bytes, what `link=json` answers with.
LINK_CONTENT: dict[str, Any] = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["url", "expires_at"],
            "properties": {"url": {"type": "string"}, "expires_at": {"type": "integer"}},
        }
    }
}


def link_answers() -> dict[int | str, dict[str, Any]]:
    """For the description of a route that takes `link`."""
    return {
        307: {"description": "`link=redirect`: where the bytes are, for a short while."},
    }


def download_link(own: Services, name: str, link: Link | None) -> Response | None:
    """What `link` asks for; None where the bytes are to be sent. The caller may see the object.

    Raises Conflict where there are no links and nothing else will do; FileNotFoundError.
    """
    if link is None:
        return None
    objects, lifetime_s = own.data.objects, own.settings.storage_link_s
    url = None
    if objects is not None and objects.can_link and lifetime_s:
        objects.size(name)
        url = objects.link(name, lifetime_s)
    if url is None:
        if link == "redirect":
            return None
        raise Conflict(
            "This server gives no download links: ask without `link`.", code="no_download_links"
        )
    unkept = {"cache-control": "no-store"}
    if link == "redirect":
        return RedirectResponse(url, TEMPORARY_REDIRECT, unkept)
    expires_at = own.clock() + timedelta(seconds=lifetime_s)
    answer = json_answer(DownloadLinkBody(url=url, expires_at=int(expires_at.timestamp())))
    answer.headers.update(unkept)
    return answer


def download(
    request: Request,
    data: DataDir,
    name: str,
    path: Path,
    made_at: datetime,
    headers: dict[str, str],
    *,
    may_compress: bool,
) -> Response:
    """A file that never changes: the copy under `path` if there is one, else the object.

    `may_compress`: with gzip, for clients that accept it.

    Raises FileNotFoundError, ObjectsUnavailable.
    """
    try:
        known = path.stat()
    except FileNotFoundError:
        if data.objects is None:
            raise
        return _from_store(request, data.objects, name, made_at, headers, may_compress=may_compress)
    if data.objects is not None:  # the same from every server, whenever its copy was made
        headers = headers | _validators(name, known.st_size, made_at)
    return FileDownload(path, known, headers, JSONL, may_compress=may_compress)


def _from_store(
    request: Request,
    objects: Objects,
    name: str,
    made_at: datetime,
    headers: dict[str, str],
    *,
    may_compress: bool,
) -> Response:
    """As `FileDownload`, but that of several ranges at once the whole is sent."""
    size = objects.size(name)
    validators = _validators(name, size, made_at)
    etag = validators["etag"]
    gzip_etag = f'{etag[:-1]}-gzip"'
    asked = request.headers
    compresses = may_compress and accepts_gzip(asked) and "range" not in asked
    headers = {
        **headers,
        **validators,
        **(VARIES if may_compress else {}),
        "etag": gzip_etag if compresses else etag,
    }
    etags = {etag, gzip_etag} if may_compress else {etag}
    if is_known(asked, etags, headers["last-modified"]):
        return Response(status_code=304, headers=kept_headers(headers))
    if compresses:
        headers["content-encoding"] = "gzip"
        blocks = iter(()) if request.method == "HEAD" else gzipped(_begun(objects, name, 0, size))
        return StreamingResponse(blocks, headers=headers, media_type=JSONL)
    headers["accept-ranges"] = "bytes"
    start, end, status = 0, size, 200
    wanted = _ONE_RANGE.fullmatch(asked.get("range", ""))
    condition = asked.get("if-range")
    if wanted is not None and condition in (None, etag, headers["last-modified"]):
        found = _range(wanted[1], wanted[2], size)
        if found is not None and not found[0] < found[1]:
            body = error_body(
                416,
                f"The file has {size} bytes: the range that was asked for is not in it.",
                code="range_not_satisfiable",
                param="Range",
            )
            return json_response(body, 416, {"content-range": f"bytes */{size}"})
        if found is not None:
            (start, end), status = found, 206
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    pieces = iter(()) if request.method == "HEAD" else _begun(objects, name, start, end)
    return StreamingResponse(pieces, status, headers, media_type=JSONL)


def _validators(name: str, size: int, made_at: datetime) -> dict[str, str]:
    tag = hashlib.md5(f"{name} {size}".encode(), usedforsecurity=False).hexdigest()
    return {
        "etag": f'"{tag}"',
        "last-modified": format_datetime(made_at.replace(microsecond=0), usegmt=True),
    }


def _range(first: str, last: str, size: int) -> tuple[int, int] | None:
    """From where to where; empty where it is beyond the end, None where it means nothing."""
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
        return None if last and int(last) < start else (start, max(start, end))
    return (max(0, size - int(last)), size) if last else None


def _begun(objects: Objects, name: str, start: int, end: int) -> Iterator[bytes]:
    """The bytes; what is wrong with the first of them is said before the answer begins."""
    pieces = objects.read(name, start, end)
    first = next(pieces, b"")
    return chain([first], pieces)
