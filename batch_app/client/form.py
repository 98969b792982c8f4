"""A multipart form with one file, sent in pieces: memory does not grow with the file."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping

from batch_app.client.source import Source


class Form:
    def __init__(self, fields: Mapping[str, str], source: Source) -> None:
        self._boundary = uuid.uuid4().hex
        self._fields = fields
        self._source = source

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={self._boundary}"

    def blocks(self) -> Iterator[bytes]:
        """The body, from its beginning. The fields come first: the server then knows the model
        while the file arrives."""
        for name, value in self._fields.items():
            yield self._head(f'name="{name}"') + value.encode() + b"\r\n"
        # The server has no use for the file's own name beyond showing it.
        name = "".join(c if c.isascii() and c.isprintable() else "_" for c in self._source.name)
        name = name.replace('"', "_").replace("\\", "_")[:200] or "requests.jsonl"
        yield self._head(f'name="file"; filename="{name}"', "application/jsonl")
        yield from self._source.blocks()
        yield f"\r\n--{self._boundary}--\r\n".encode()

    def _head(self, disposition: str, content_type: str | None = None) -> bytes:
        lines = [f"--{self._boundary}", f"Content-Disposition: form-data; {disposition}"]
        if content_type is not None:
            lines.append(f"Content-Type: {content_type}")
        return "\r\n".join([*lines, "", ""]).encode()
