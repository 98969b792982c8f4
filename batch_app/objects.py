"""Objects: bytes under names, in a store that all machines of a site reach.

The store is named by a URL: `s3://bucket/prefix`, `gs://…`, `az://…`, or `file:///folder` for one
that several machines have mounted. What it is allowed to do comes from the environment, as the
library takes it (docs/object_storage.md). Nothing here knows what the bytes are; that is in
`batch_app.shared_files`. This is the only module that imports the library.

Every call blocks, and may be made from any thread. An object is there whole or not at all.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from batch_app.errors import ConfigError, ObjectsUnavailable, StorageFull

if TYPE_CHECKING:
    from batch_app.config import Settings

logger = logging.getLogger(__name__)

#: What one request reads. A transfer that breaks off costs no more than this, and a timeout holds
#: for so many bytes, not for a whole file.
READ_BYTES = 8 << 20
#: Parts of one file that are on their way at once.
MAX_CONCURRENCY = 4
#: S3 takes no more parts of one object.
MAX_PARTS = 9_000
#: A store that is away is reported after about this long; who waits for it asks again.
RETRY_S, MAX_RETRIES = 10.0, 3
CONNECT_S, REQUEST_S = 5.0, 60.0
#: Keys asked for at once, where the library deletes or lists many.
AT_ONCE = 1000

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "file")
#: Where an endpoint of one's own is named, by the scheme's family.
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_QUERY = re.compile(r"\?[^\s\"']*")
_NO_SUCH_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.I)
_NO_ROOM = re.compile(r"os error (28|122)\b")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as a listing tells of it. `modified_at` is the store's time, in UTC."""

    name: str
    size_bytes: int
    modified_at: datetime


class Objects:
    """One store. Its methods raise ObjectsUnavailable when it doesn't answer, or refuses."""

    def __init__(self, url: str, *, part_bytes: int = READ_BYTES) -> None:
        """Asks nothing of the store yet. Raises ConfigError where the URL can't be used."""
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ConfigError(
                f"storage_url names {parts.scheme or 'no scheme'!r}; it can be s3://bucket/prefix, "
                "gs://bucket/prefix, az://container/prefix or file:///folder."
            )
        if "@" in parts.netloc and not parts.scheme.startswith("abfs"):
            raise ConfigError(
                "storage_url has a user or password in it: leave them to the environment."
            )
        if parts.query or parts.fragment:
            raise ConfigError("storage_url takes no ? or #: options come from the environment.")
        self._part_bytes = part_bytes
        self._folder = Path(unquote(parts.path)) if parts.scheme == "file" else None
        if self._folder is not None and (parts.netloc or self._folder == Path("/")):
            raise ConfigError("storage_url needs a whole path: file:///folder.")
        if self._folder is None and not parts.netloc:
            raise ConfigError(f"storage_url names no bucket: {parts.scheme}://bucket/prefix.")
        #: For people; there is nothing secret in it.
        self.shown_url = url
        try:
            import obstore
            from obstore import exceptions, store
        except ImportError:
            raise ConfigError(
                "storage_url needs the library obstore: pip install 'vllm-batch-server[objects]'."
            ) from None
        self._library: Any = obstore
        self._errors: Any = exceptions
        try:
            if self._folder is not None:
                self._store: Any = None  # its folder may appear later
                self._local: Any = store.LocalStore
            else:
                self._store = store.from_url(url, **_options(parts.scheme, os.environ))
        except (exceptions.BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"storage_url can't be used: {_told(error)}") from None

    @property
    def folder(self) -> Path | None:
        """Where the objects are, when they are in a folder."""
        return self._folder

    @property
    def can_link(self) -> bool:
        """Whether clients could be sent to the store itself."""
        return self._folder is None

    # -- writing -------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> None:
        """Durable when it returns. Raises also StorageFull."""
        with self._asking(f"put {name}") as store:
            self._library.put(store, name, data, use_multipart=False)
            self._sync(name)

    def put_file(self, name: str, path: Path) -> None:
        """As `put`, streamed in parts where the file is large. Raises also OSError of the file."""
        size = path.stat().st_size
        chunk = max(self._part_bytes, -(-size // MAX_PARTS))
        with self._asking(f"put {name}") as store:
            self._library.put(
                store,
                name,
                path,
                use_multipart=size > chunk,
                chunk_size=chunk,
                max_concurrency=MAX_CONCURRENCY,
            )
            self._sync(name)

    def delete(self, names: Sequence[str]) -> None:
        """Remove these; those that aren't there are no matter."""
        with self._asking("delete") as store:
            if self._folder is None:
                for start in range(0, len(names), AT_ONCE):
                    self._library.delete(store, list(names[start : start + AT_ONCE]))
                return
            for name in names:
                try:
                    self._library.delete(store, name)
                except (FileNotFoundError, self._errors.NotFoundError):
                    continue

    # -- reading -------------------------------------------------------------------------------

    def size(self, name: str) -> int:
        """In bytes. Raises FileNotFoundError."""
        with self._asking(f"head {name}") as store:
            try:
                return int(self._library.head(store, name)["size"])
            except (FileNotFoundError, self._errors.NotFoundError):
                # The answer to this one says whether it is the bucket that isn't there.
                self._library.get(store, name)
                raise

    def get(self, name: str) -> bytes:
        """All of a small object. Raises FileNotFoundError."""
        with self._asking(f"get {name}") as store:
            return bytes(self._library.get(store, name).bytes())

    def read(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to `end`, in pieces. Raises FileNotFoundError."""
        while start < end:
            with self._asking(f"get {name}") as store:
                stop = min(start + READ_BYTES, end)
                piece = bytes(self._library.get_range(store, name, start=start, end=stop))
            if len(piece) != stop - start:
                raise ObjectsUnavailable(f"The object storage gave less of {name} than it has.")
            yield piece
            start = stop

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """The objects under a prefix of whole segments (`results/BATCH`), in order of names where
        the store keeps one."""
        with self._asking(f"list {prefix}") as store:
            found = iter(self._library.list(store, prefix, chunk_size=AT_ONCE))
        while True:
            try:
                with self._asking(f"list {prefix}"):
                    page = next(found, None)
            except FileNotFoundError:
                return
            if page is None:
                return
            for meta in page:
                yield StoredObject(str(meta["path"]), int(meta["size"]), meta["last_modified"])

    def ping(self) -> None:
        """Ask for a sign of life."""
        next(self.list("site"), None)

    def link(self, name: str, lifetime_s: int) -> str | None:
        """A URL that lets anyone who has it read this object for so long; None where the store, or
        what it lets us do, has none."""
        if self._folder is not None:
            return None
        try:
            lifetime = timedelta(seconds=lifetime_s)
            return str(self._library.sign(self._store, "GET", name, lifetime))
        except (self._errors.BaseError, ValueError) as error:
            logger.warning("The object storage signs no links: %s", _told(error))
            return None

    # -- inside --------------------------------------------------------------------------------

    @contextmanager
    def _asking(self, doing: str) -> Iterator[Any]:
        """The library's store; what it raises becomes one of our errors."""
        try:
            yield self._opened()
        except (FileNotFoundError, self._errors.NotFoundError) as error:
            if _NO_SUCH_BUCKET.search(str(error)):
                raise _unavailable(doing, error, "the bucket isn't there") from None
            if self._folder is not None and not self._folder.is_dir():
                raise _unavailable(doing, error, "the folder isn't there") from None
            raise FileNotFoundError(f"No such object ({doing}).") from None
        except (
            PermissionError,
            self._errors.UnauthenticatedError,
            self._errors.PermissionDeniedError,
        ) as error:
            raise _unavailable(doing, error, "access is denied") from None
        except self._errors.BaseError as error:
            if _NO_ROOM.search(str(error)):
                raise StorageFull("No space left in the object storage's folder.") from None
            raise _unavailable(doing, error, "") from None

    def _opened(self) -> Any:
        if self._folder is not None:
            if not self._folder.is_dir():
                raise ObjectsUnavailable("The object storage's folder isn't there.")
            if self._store is None:
                self._store = self._local(self._folder, automatic_cleanup=True)
        return self._store

    def _sync(self, name: str) -> None:
        """The library leaves a folder's files to the page cache; a file that counts does not."""
        if self._folder is None:
            return
        path = self._folder / name
        try:
            for place in (path, *path.parents):
                descriptor = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                if place == self._folder:
                    return
        except OSError as error:
            raise ObjectsUnavailable(
                f"The object storage's folder can't be written: {error.strerror}."
            ) from error


def open_objects(settings: Settings) -> Objects | None:
    """The store of these settings; None where files are in the data folder only.

    Raises ConfigError: also for a folder in the data folder, whose files are copies that may go.
    """
    if not settings.storage_url:
        return None
    objects = Objects(settings.storage_url, part_bytes=settings.storage_part_bytes)
    folder = objects.folder
    if folder is not None and folder.resolve().is_relative_to(settings.data_dir.resolve()):
        raise ConfigError(
            f"storage_url names a folder in the data folder ({settings.data_dir}): choose another."
        )
    return objects


def _options(scheme: str, environment: Mapping[str, str]) -> dict[str, Any]:
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=CONNECT_S),
        "timeout": timedelta(seconds=REQUEST_S),
    }
    family = "s3" if scheme.startswith("s3") else "az"
    named = (environment.get(name, "") for name in _ENDPOINTS[family])
    endpoint = next(filter(None, named), "")
    if scheme != "gs" and endpoint.startswith("http://"):
        client["allow_http"] = True  # only where the endpoint itself says so
    options: dict[str, Any] = {
        "client_options": client,
        "retry_config": {
            "max_retries": MAX_RETRIES,
            "retry_timeout": timedelta(seconds=RETRY_S),
        },
    }
    if family == "s3" and scheme != "gs" and endpoint:
        options["endpoint"] = endpoint
    return options


def _unavailable(doing: str, error: Exception, why: str) -> ObjectsUnavailable:
    """What callers read has nothing of the store's own words, which name hosts and keys."""
    logger.warning("The object storage (%s): %s", doing, _told(error))
    return ObjectsUnavailable(f"The object storage does not answer{f': {why}' if why else ''}.")


def _told(error: Exception) -> str:
    """The first of what it says, without what a URL may carry in its query."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _QUERY.sub("?…", lines[0])[:300]
