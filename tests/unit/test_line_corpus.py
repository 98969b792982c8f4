"""What once broke something, and what is likely to: replayed on every run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.errors import BadRequest
from batch_app.lines import LineParser, LineProblem, RequestLine
from batch_app.multipart import Form
from batch_app.wire.lines import error_line, response_line
from support.torture import REFUSED, TAKEN

CORPUS = Path(__file__).parents[1] / "corpus"
LINES = sorted((CORPUS / "lines").iterdir())
FORMS = sorted((CORPUS / "forms").iterdir())


def plain(raw: bytes) -> RequestLine | None:
    try:
        return LineParser().parse_plain(raw)
    except LineProblem:
        return None


def check(raw: bytes) -> RequestLine | None:
    """What becomes of the line, the same on both ways; nothing but LineProblem is raised."""
    expected = plain(raw)
    for parser in (LineParser(), _after_a_good_line()):
        assert parser.parse_short(raw) in (None, expected)
    if expected is not None:
        assert orjson.loads(expected.body) == orjson.loads(raw)["body"]
    return expected


def _after_a_good_line() -> LineParser:
    parser = LineParser()
    parser.parse(b'{"custom_id":"a","body":{"messages":[{"role":"user"}]}}')
    return parser


@pytest.mark.parametrize("path", LINES, ids=lambda path: path.stem)
def test_lines_of_the_corpus(path: Path) -> None:
    raw = path.read_bytes()
    check(raw)
    for cut in range(0, len(raw), max(1, len(raw) // 50)):
        check(raw[:cut])


@pytest.mark.parametrize("name", REFUSED)
def test_torture(name: str) -> None:
    assert check(REFUSED[name]) is None


@pytest.mark.parametrize("name", TAKEN)
def test_torture_that_is_good_json(name: str) -> None:
    raw = TAKEN[name].replace(b"%b", b"an id")
    line = check(raw)
    assert line is not None
    assert line.custom_id == "an id"


@given(st.sampled_from([path.read_bytes() for path in LINES]), st.data())
def test_damaged_lines_of_the_corpus(raw: bytes, data: st.DataObject) -> None:
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    check(bytes(damaged))


# -- the wire layer ----------------------------------------------------------------------------


PLAIN_FORM = "multipart/form-data; boundary=b"


def take_form(body: bytes, cuts: list[int], content_type: str = PLAIN_FORM) -> None:
    """Only BadRequest may come of it."""
    with suppress(BadRequest):
        form = Form(
            content_type, file_field="file", on_file=lambda fields: None, on_data=lambda data: None
        )
        start = 0
        for cut in sorted(cuts):
            form.write(body[start:cut])
            start = cut
        form.write(body[start:])
        form.finish()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_of_the_corpus(path: Path) -> None:
    body = path.read_bytes()
    take_form(body, [])
    take_form(body, list(range(len(body))))


_FORM_PIECES = st.lists(
    st.sampled_from(
        [
            b"--b",
            b"--b--",
            b"\r\n",
            b"\r",
            b"\n",
            b'Content-Disposition: form-data; name="file"; filename="x"',
            b'Content-Disposition: form-data; name="model"',
            b"Content-Disposition: ",
            b"Content-Transfer-Encoding: gzip",
            b": ",
            b"\x00",
            b"\xff",
            b"{}",
        ]
    )
    | st.binary(max_size=4),
    max_size=20,
).map(b"".join)


@given(_FORM_PIECES, st.lists(st.integers(0, 300), max_size=4))
def test_any_form(body: bytes, cuts: list[int]) -> None:
    take_form(body, cuts)


@given(st.text(st.characters(max_codepoint=255), max_size=60))  # As headers are decoded.
def test_any_content_type(content_type: str) -> None:
    take_form(b"--b--\r\n", [], content_type)
    take_form(b"--b--\r\n", [], f"multipart/form-data; boundary={content_type}")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(0, 2**32 - 1))
def test_lines_that_are_published(custom_id: str, number: int) -> None:
    """One line of JSON, whatever the id: an id can't end the line or begin another field."""
    for raw in (
        response_line("batch_0", number, custom_id, 200, b"{}"),
        error_line("batch_0", number, custom_id, "code", custom_id),
    ):
        assert b"\n" not in raw
        assert b"\r" not in raw
        line = orjson.loads(raw)
        assert list(line) == ["id", "custom_id", "response", "error"]
        assert line["custom_id"] == custom_id
