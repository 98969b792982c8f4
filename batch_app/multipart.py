"""Taking a multipart form apart as its bytes arrive: fields into memory, one file into a sink.

Knows nothing of batches. Everything but the file's content is bounded.
"""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from batch_app.errors import BadRequest, UnsupportedMedia

MAX_PARTS = 32
MAX_FIELD_BYTES = 64 * 1024
MAX_FILENAME_CHARS = 255
_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})


class Form:
    """One form, with one file part that goes to a sink.

    `on_file(fields)` is called where the file part begins, with the fields seen until then;
    `on_data` with each piece of its content. `fields` and `filename` are complete once `finish`
    has returned. What a callback raises comes out of `write`.
    """

    def __init__(
        self,
        content_type: str | None,
        *,
        file_field: str,
        on_file: Callable[[dict[str, str]], None],
        on_data: Callable[[bytes], None],
    ) -> None:
        kind, options = parse_options_header(content_type or "")
        if kind != b"multipart/form-data":
            raise UnsupportedMedia(
                f'Send the body as multipart/form-data, the file as its field "{file_field}": '
                f"curl -F {file_field}=@batch.jsonl …"
            )
        boundary = options.get(b"boundary")
        if not boundary:
            raise BadRequest("The Content-Type header names no multipart boundary.")
        self._file_field = file_field
        self._on_file = on_file
        self._on_data = on_data
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.has_file = False
        self._num_parts = 0
        self._complete = False
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._part: str | None = None
        self._in_file = False
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_field_data,
                    "on_header_value": self._header_value_data,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._part_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise BadRequest(f"The multipart boundary can't be used: {error}.") from None

    def write(self, data: bytes) -> None:
        """The next bytes of the body. Raises BadRequest where they aren't a form."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadRequest(f"The body is not a proper multipart form: {error}.") from None

    def finish(self) -> None:
        """The body has ended. Raises BadRequest where the form hasn't."""
        if not self._complete:
            raise BadRequest(
                "The body ended before the form did: its last boundary is missing. "
                "The upload was cut off, or the form was put together wrongly."
            )

    # -- the parser's callbacks ----------------------------------------------------------------

    def _begin_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise BadRequest(f"The form has more than {MAX_PARTS} parts.")
        self._headers.clear()
        self._value.clear()

    def _header_field_data(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise BadRequest("A part of the form has no name.")
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise UnsupportedMedia("Send the form's parts as they are, with no transfer encoding.")
        self._part = name.decode("utf-8", "replace")
        self._in_file = self._part == self._file_field
        if self._in_file:
            if self.has_file:
                raise BadRequest(
                    f'The form has several "{self._file_field}" parts; a batch has one input file.',
                    param=self._file_field,
                )
            self.has_file = True
            self.filename = clean_filename(options.get(b"filename", b""))
            self._on_file(self.fields)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._on_data(data[start:end])
            return
        if len(self._value) + end - start > MAX_FIELD_BYTES:
            raise BadRequest(
                f'The field "{_short(self._part)}" is longer than {MAX_FIELD_BYTES} bytes.',
                param=_short(self._part),
            )
        self._value += data[start:end]

    def _end_part(self) -> None:
        if self._in_file:
            self._in_file = False
            return
        name = self._part or ""
        if name in self.fields:
            raise BadRequest(f'The form has the field "{_short(name)}" twice.', param=_short(name))
        try:
            self.fields[name] = self._value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequest(
                f'The field "{_short(name)}" is not valid UTF-8.', param=_short(name)
            ) from None

    def _end(self) -> None:
        self._complete = True


def _short(name: str | None) -> str:
    return (name or "")[:100]


def clean_filename(raw: bytes) -> str:
    """The name a user gave a file, fit to be shown and to stand in a header: no folders, no control
    characters, no double quotes, not long."""
    name = raw.decode("utf-8", "replace").replace("\\", "/").rsplit("/", 1)[-1]
    name = "".join(char for char in name if char.isprintable() and char != '"').strip()
    return name[:MAX_FILENAME_CHARS] or "upload.jsonl"
