"""Files and Uploads of the OpenAI dialect."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from batch_app.core import FilePurpose, StoredFile, Upload, UploadPart, UploadStatus
from batch_app.errors import BadRequest, Conflict, NotFound, TooLarge
from batch_app.file_uploads import FileUpload, PartUpload, assemble, checked_purpose
from batch_app.files import DataDir, new_id
from batch_app.housekeeping import remove_bytes
from batch_app.incoming import receive
from batch_app.keys import Caller
from batch_app.multipart import clean_filename
from batch_app.routes.answers import (
    JSONL,
    a_part_of,
    form_schema,
    json_answer,
    json_schema,
    refusals,
)
from batch_app.routes.bodies import read_json
from batch_app.routes.object_downloads import (
    LINK,
    LINK_CONTENT,
    Link,
    download,
    download_link,
    link_answers,
)
from batch_app.routes.services import Services, caller, note_object, services
from batch_app.shared_files import file_name, remove_upload
from batch_app.store import require_pending
from batch_app.wire.openai import (
    DeletedFileBody,
    FileBody,
    FileListBody,
    PartBody,
    PartListBody,
    UploadBody,
    UploadComplete,
    UploadCreate,
    as_purpose,
    file_body,
    file_list_body,
    part_body,
    part_list_body,
    upload_body,
)

files_router = APIRouter(tags=["files"])
uploads_router = APIRouter(tags=["uploads"])

MAX_LIMIT = 10_000
#: An upload that isn't completed by then is gone, as in the dialect's reference.
UPLOAD_LIFE = timedelta(hours=1)
MAX_PART_BYTES = 64 << 20
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_UPLOAD_ID = re.compile(r"upload_[0-9a-f]{24}")

_FILE_FORM = form_schema(
    {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
    ["file", "purpose"],
)
_PART_FORM = form_schema({"data": {"type": "string", "format": "binary"}}, ["data"])


def checked_file_id(file_id: str) -> str:
    """The id, if it looks like one the server made: nothing else reaches a path or a query."""
    if not _FILE_ID.fullmatch(file_id):
        raise NotFound(f"No such file: {file_id[:64]!r}", param="file_id")
    return file_id


def _json_body(model: type[Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": json_schema(model)}}


# -- files -----------------------------------------------------------------------------------------


@files_router.post(
    "/v1/files",
    response_model=FileBody,
    responses=refusals(400, 413, 415, 503, 507),
    openapi_extra=_FILE_FORM,
)
async def create_file(request: Request) -> Response:
    """Upload a file. Its lines are checked when a batch is made of it."""
    own = services(request)
    upload = FileUpload(own.for_uploads(caller(request)))
    file = await receive(upload, dict(request.headers), request.stream())
    note_object(request, file.id)
    return json_answer(file_body(own.retention.applied_to(file)))


@files_router.get("/v1/files", response_model=FileListBody, responses=refusals(400, 404, 503))
def list_files(
    request: Request,
    purpose: str | None = Query(None, description="Only files of this purpose."),
    limit: int = Query(MAX_LIMIT, ge=1, le=MAX_LIMIT),
    order: Literal["asc", "desc"] = Query("desc", description="By time of creation."),
    after: str | None = Query(None, description="The last id of the page before."),
) -> Response:
    """Files, newest first."""
    wanted = None
    if purpose is not None:
        wanted = as_purpose(purpose)
        if wanted is None:
            return json_answer(file_list_body([], has_more=False))
    own = services(request)
    page, has_more = own.store.list_files(
        limit=limit,
        after=None if after is None else checked_file_id(after),
        purpose=wanted,
        newest_first=order == "desc",
        seen_by=caller(request),
    )
    return json_answer(file_list_body([own.retention.applied_to(file) for file in page], has_more))


@files_router.get("/v1/files/{file_id}", response_model=FileBody, responses=refusals(400, 404, 503))
def get_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    own = services(request)
    file = own.store.get_file(checked_file_id(file_id), seen_by=caller(request))
    return json_answer(file_body(own.retention.applied_to(file)))


@files_router.head("/v1/files/{file_id}/content", include_in_schema=False)
@files_router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses={
        200: {
            "description": "The file's bytes, as they were uploaded or published, and never "
            "compressed, whatever `Accept-Encoding` says.",
            "content": {JSONL: {"schema": {"type": "string"}}, **LINK_CONTENT},
        },
        **a_part_of("the file"),
        **link_answers(),
        **refusals(400, 404, 409, 503),
    },
)
def get_content(request: Request, file_id: str, link: Link | None = LINK) -> Response:
    """The bytes of a file."""
    own = services(request)
    file = own.store.get_file(checked_file_id(file_id), seen_by=caller(request))
    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    name, path = file_name(file), _path(own.data, file)
    try:
        return download_link(own, name, link) or download(
            request, own.data, name, path, file.created_at, headers, may_compress=False
        )
    except FileNotFoundError:
        raise NotFound(f"The content of {file.id} is gone.", param="file_id") from None


@files_router.delete(
    "/v1/files/{file_id}", response_model=DeletedFileBody, responses=refusals(400, 404, 409, 503)
)
def delete_file(request: Request, file_id: str) -> Response:
    """Delete a file. The input of a batch that has not finished stays."""
    own = services(request)
    file = own.store.delete_file(checked_file_id(file_id), own.clock(), seen_by=caller(request))
    remove_bytes(own.data, own.store, file)
    return json_answer(DeletedFileBody(id=file.id))


def _path(data: DataDir, file: StoredFile) -> Path:
    if file.purpose is FilePurpose.BATCH:
        return data.input_file(file.id)
    return data.output_file(file.id)


# -- uploads ---------------------------------------------------------------------------------------


def _upload(own: Services, asks: Caller, upload_id: str) -> Upload:
    if not _UPLOAD_ID.fullmatch(upload_id):
        raise NotFound(f"No such upload: {upload_id[:64]!r}", param="upload_id")
    return own.store.get_upload(upload_id, own.clock(), seen_by=asks)


def _pending_upload(own: Services, asks: Caller, upload_id: str) -> Upload:
    upload = _upload(own, asks, upload_id)
    require_pending(upload)
    return upload


def _file_of(own: Services, asks: Caller, upload: Upload) -> StoredFile | None:
    """What a completed upload became, unless that was deleted since."""
    with suppress(NotFound):
        if upload.file_id:
            file = own.store.get_file(upload.file_id, seen_by=asks)
            return own.retention.applied_to(file)
    return None


@uploads_router.post(
    "/v1/uploads",
    response_model=UploadBody,
    responses=refusals(400, 413, 415, 503, 507),
    openapi_extra=_json_body(UploadCreate),
)
async def create_upload(request: Request) -> Response:
    """Begin a file that arrives in parts."""
    own = services(request)
    wish, _ = await read_json(request, UploadCreate)
    if wish.bytes > own.settings.max_upload_bytes:
        raise TooLarge(
            f"The file is larger than {own.settings.max_upload_bytes} bytes (max_upload_bytes).",
            param="bytes",
        )
    now = own.clock()
    upload = Upload(
        id=new_id("upload"),
        filename=clean_filename(wish.filename.encode()),
        purpose=checked_purpose(wish.purpose),
        size_bytes=wish.bytes,
        mime_type=wish.mime_type,
        status=UploadStatus.PENDING,
        created_at=now,
        expires_at=now + UPLOAD_LIFE,
        file_expires_after_s=wish.expires_after.seconds if wish.expires_after else None,
        owner=caller(request).owner,
    )
    await run_in_threadpool(own.store.add_upload, upload)
    note_object(request, upload.id)
    return json_answer(upload_body(upload))


@uploads_router.get(
    "/v1/uploads/{upload_id}", response_model=UploadBody, responses=refusals(400, 404, 503)
)
def get_upload(request: Request, upload_id: str) -> Response:
    """What is known of an upload. Our own addition."""
    own = services(request)
    asks = caller(request)
    upload = _upload(own, asks, upload_id)
    return json_answer(upload_body(upload, _file_of(own, asks, upload)))


@uploads_router.get(
    "/v1/uploads/{upload_id}/parts",
    response_model=PartListBody,
    responses=refusals(400, 404, 503),
)
def list_parts(request: Request, upload_id: str) -> Response:
    """The parts that have arrived: whoever was cut off sends the others. Our own addition."""
    own = services(request)
    asks = caller(request)
    upload = _upload(own, asks, upload_id)
    return json_answer(part_list_body(own.store.get_parts(upload.id, seen_by=asks)))


@uploads_router.post(
    "/v1/uploads/{upload_id}/parts",
    response_model=PartBody,
    responses=refusals(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=_PART_FORM,
)
async def add_part(request: Request, upload_id: str) -> Response:
    """Add a part, of at most 64 MiB. Parts may arrive in any order, and side by side."""
    own = services(request)
    upload = await run_in_threadpool(_pending_upload, own, caller(request), upload_id)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > MAX_PART_BYTES + (1 << 16):
        raise TooLarge(f"A part has at most {MAX_PART_BYTES} bytes.", param="data")
    part: UploadPart = await receive(
        PartUpload(own.for_uploads(caller(request)), upload),
        dict(request.headers),
        request.stream(),
    )
    return json_answer(part_body(part))


@uploads_router.post(
    "/v1/uploads/{upload_id}/complete",
    response_model=UploadBody,
    responses=refusals(400, 404, 409, 413, 415, 503, 507),
    openapi_extra=_json_body(UploadComplete),
)
async def complete_upload(request: Request, upload_id: str) -> Response:
    """Put the parts together, in the order of `part_ids`."""
    own = services(request)
    wish, _ = await read_json(request, UploadComplete)
    body = await to_thread.run_sync(
        _complete, own, caller(request), upload_id, wish, limiter=own.upload_limiter
    )
    return json_answer(body)


def _complete(own: Services, asks: Caller, upload_id: str, wish: UploadComplete) -> UploadBody:
    upload = _upload(own, asks, upload_id)
    if upload.status is UploadStatus.COMPLETED:
        # Asked again because the first answer was lost: it is the same file.
        return upload_body(upload, _file_of(own, asks, upload))
    require_pending(upload)
    known = {part.id: part for part in own.store.get_parts(upload.id, seen_by=asks)}
    unknown = next((part_id for part_id in wish.part_ids if part_id not in known), None)
    if unknown is not None:
        raise BadRequest(f"No such part of this upload: {unknown[:64]!r}", param="part_ids")
    if len(set(wish.part_ids)) != len(wish.part_ids):
        raise BadRequest("A part is named twice.", param="part_ids")
    parts = [known[part_id] for part_id in wish.part_ids]
    try:
        file = assemble(own.data, upload, parts, md5=wish.md5, now=own.clock())
    except FileNotFoundError:
        # It ended meanwhile, most likely.
        require_pending(_upload(own, asks, upload_id))
        raise Conflict(
            f"Parts of {upload_id} are gone: begin a new upload.", code="upload_not_pending"
        ) from None
    completed = False
    try:
        upload = own.store.complete_upload(upload.id, file, seen_by=asks)
        completed = True
    finally:
        if not completed:
            own.data.input_file(file.id).unlink(missing_ok=True)
    remove_upload(own.data, upload.id)
    return upload_body(upload, own.retention.applied_to(file))


@uploads_router.post(
    "/v1/uploads/{upload_id}/cancel",
    response_model=UploadBody,
    responses=refusals(400, 404, 409, 503),
)
def cancel_upload(request: Request, upload_id: str) -> Response:
    """Give an upload up, and remove its parts."""
    own = services(request)
    asks = caller(request)
    upload = own.store.cancel_upload(_upload(own, asks, upload_id).id, seen_by=asks)
    remove_upload(own.data, upload.id)
    return json_answer(upload_body(upload))
