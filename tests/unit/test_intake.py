"""Intake: any chunking gives the same result, and the index points exactly at the lines."""

from __future__ import annotations

import codecs
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.core import LineError
from batch_app.errors import BadLines, IndexUnreadable, StorageFull
from batch_app.index import DTYPE, Index, IndexWriter
from batch_app.intake import Intake, IntakeRules, IntakeSummary, index_file
from batch_app.registry import ModelEntry, ModelRegistry

REGISTRY = ModelRegistry(
    [
        ModelEntry(name="one", source="one", aliases=("uno",)),
        ModelEntry(name="two", source="two"),
    ]
)
RULES = IntakeRules(REGISTRY, model="one", max_line_bytes=2000)


def line(custom_id: str = "a", **fields: object) -> bytes:
    messages = [{"role": "user", "content": "What?"}]
    return json.dumps({"custom_id": custom_id, "body": {"messages": messages} | fields}).encode()


def lines(num: int) -> bytes:
    return b"".join(line(f"r{number}", max_tokens=number) + b"\n" for number in range(num))


Outcome = tuple[IntakeSummary, list[list[int]]] | tuple[tuple[LineError, ...], int]


def take(content: bytes, cuts: list[int], rules: IntakeRules = RULES) -> Outcome:
    """What intake makes of this content, cut into chunks at these places."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        path.write_bytes(content)
        intake = Intake(path, Path(folder), rules)
        try:
            for end in sorted(cut % (len(content) + 1) for cut in cuts):
                intake.grown(end)
            summary = intake.finish()
        except BadLines as error:
            return error.errors, error.num_errors
        finally:
            intake.close()
        return summary, Index.load(Path(folder)).records.tolist()


_PIECES = st.lists(
    st.sampled_from(
        [
            line("a"),
            line("b", max_tokens=5),
            line("c", temperature=1.0),
            line("ü🦆"),
            line("long", user="x" * 2500),
            line("nearly", user="x" * 1900),
            b"",
            b"  \t",
            b"{",
            b"[]",
            b"\xff\xfe",
            codecs.BOM_UTF8,
            b"\x00",
        ]
    ).flatmap(lambda piece: st.sampled_from([piece + b"\n", piece + b"\r\n", piece])),
    max_size=12,
).map(b"".join)


@given(_PIECES, st.lists(st.integers(0, 10_000), max_size=20))
def test_any_chunking_gives_the_same(content: bytes, cuts: list[int]) -> None:
    assert take(content, cuts) == take(content, [])


@given(_PIECES)
def test_every_byte_by_itself_gives_the_same(content: bytes) -> None:
    assert take(content, list(range(len(content)))) == take(content, [])


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_any_bytes_give_a_result_or_bad_lines(content: bytes, cuts: list[int]) -> None:
    take(content, cuts)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("cuts", [[], list(range(500))])
def test_a_utf_16_file_is_one_error(codec: str, cuts: list[int]) -> None:
    content = ("\ufeff" + lines(50).decode()).encode(codec)
    errors, num_errors = take(content, cuts)
    assert num_errors == 1
    assert isinstance(errors[0], LineError)
    assert (errors[0].code, errors[0].line) == ("invalid_json_line", 1)


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (b"[\n {}\n]", "JSON array"),
        (b'\xef\xbb\xbf [{"custom_id": "a"}]', "JSON array"),
        (b'{\r\n "custom_id": "a"\n}', "in several lines"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"(\xb5/\xfd\x00", "zstd"),
        (b"PK\x03\x04", "ZIP"),
        (b"PAR1\x15", "Parquet"),
    ],
)
@pytest.mark.parametrize("cuts", [[], list(range(50))])
def test_a_file_of_another_kind_is_one_error(begins: bytes, words: str, cuts: list[int]) -> None:
    errors, num_errors = take(begins + b"\n\n" + lines(50), cuts)
    assert num_errors == 1
    assert isinstance(errors[0], LineError)
    assert (errors[0].code, errors[0].line) == ("invalid_json_line", 1)
    assert words in errors[0].message


_IDS = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=15, unique=True)
_ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \n"])


@given(_IDS, _ENDS, st.booleans(), st.booleans(), st.lists(st.integers(0, 5000), max_size=6))
def test_the_index_points_exactly_at_the_lines(
    ids: list[str], end: bytes, bom: bool, last_end: bool, cuts: list[int]
) -> None:
    content = (codecs.BOM_UTF8 if bom else b"") + end.join(line(each) for each in ids)
    content += end if last_end else b""

    summary, records = take(content, cuts)

    assert isinstance(summary, IntakeSummary)
    assert isinstance(records, list)
    assert summary.num_requests == len(ids)
    for custom_id, record in zip(ids, records, strict=True):
        offset, length, number = record[:3]
        raw = content[offset : offset + length]
        assert orjson.loads(raw)["custom_id"] == custom_id
        assert raw.rstrip(b"\r") == line(custom_id)
        assert content.count(b"\n", 0, offset) == number - 1


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12))
def test_duplicates_are_found_wherever_they_stand(ids: list[str]) -> None:
    outcome = take(b"\n".join(line(each) for each in ids), [])

    repeated = [number for number, each in enumerate(ids, start=1) if each in ids[: number - 1]]
    if not repeated:
        assert isinstance(outcome[0], IntakeSummary)
        return
    errors, num_errors = outcome
    assert isinstance(errors, tuple)
    assert num_errors == len(repeated)
    assert [error.line for error in errors] == repeated
    for error in errors:
        assert error.line is not None
        assert f"line {ids.index(ids[error.line - 1]) + 1}." in error.message


def test_equal_hashes_are_not_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch_app.line_check.hash", lambda _: 7, raising=False)
    path = tmp_path / "input.jsonl"
    path.write_bytes(lines(5))

    assert index_file(path, tmp_path, RULES).num_requests == 5


def test_models_of_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(
        line("a", model="two") + b"\n" + line("b", model="uno") + b"\n" + line("c", model="one")
    )

    summary = index_file(path, tmp_path, IntakeRules(REGISTRY))

    assert summary.models == ("two", "one")
    assert Index.load(tmp_path).records["model"].tolist() == [0, 1, 1]
    assert index_file(path, tmp_path, RULES).models == ("one",)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (line("a"), "missing_required_parameter"),
        (line("a", model="three"), "model_not_found"),
    ],
)
def test_lines_that_must_name_a_model(content: bytes, code: str) -> None:
    errors, _ = take(content, [], IntakeRules(REGISTRY))
    assert isinstance(errors, tuple)
    assert errors[0].code == code


def test_endpoint_of_the_batch() -> None:
    rules = IntakeRules(REGISTRY, model="one", endpoint="/v1/embeddings")
    errors, _ = take(line("a"), [], rules)
    assert isinstance(errors, tuple)
    assert errors[0].code == "url_mismatch"


def test_longest_line(tmp_path: Path) -> None:
    content = line("a")
    exact = IntakeRules(REGISTRY, model="one", max_line_bytes=len(content))
    assert isinstance(take(content + b"\n", [], exact)[0], IntakeSummary)
    longer = IntakeRules(REGISTRY, model="one", max_line_bytes=len(content) - 1)
    for cuts in ([], [5], [5, len(content)]):
        errors, _ = take(content + b"\n", cuts, longer)
        assert isinstance(errors, tuple)
        assert "max_line_bytes" in errors[0].message


def test_full_disk_while_indexing(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(lines(20_000))
    intake = Intake(path, tmp_path, RULES)
    intake._index._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        intake._index._file = full
        with pytest.raises(StorageFull):
            intake.grown(path.stat().st_size)
    intake.close()


def test_the_index_tells_what_begins_alike(tmp_path: Path) -> None:
    document = "The quick brown fox. " * 50
    questions = [
        [{"role": "system", "content": document}, {"role": "user", "content": question * 60}]
        for question in ("Who? ", "What? ", "Who? ")
    ]
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\n".join(line(f"r{n}", messages=each) for n, each in enumerate(questions)))
    index_file(path, tmp_path, RULES)
    index = Index.load(tmp_path)
    ends = np.cumsum(index.records["num_marks"])
    first, second, third = (marks.tolist() for marks in np.split(index.prefixes, ends[:-1]))
    assert len(first) == len(json.dumps(questions[0])) // 128
    assert first == third
    assert first[:8] == second[:8]  # of the document, 1050 bytes
    assert first[9] != second[9]


def test_only_what_determines_its_answer_can_have_equals(tmp_path: Path) -> None:
    bodies: list[dict[str, object]] = [
        {"temperature": 0},
        {"temperature": 0},
        {"temperature": 0, "seed": 1},
        {"temperature": 0.5},
        {"temperature": 0.5, "seed": 1},
        {},
        {"temperature": 0, "n": 2},
    ]
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\n".join(line(f"r{n}", **body) for n, body in enumerate(bodies)))
    index_file(path, tmp_path, RULES)
    content = Index.load(tmp_path).records["content"].tolist()
    assert content[0] == content[1] != 0
    assert len({*content[1:3], content[4]} - {0}) == 3
    assert content[3] == content[5] == content[6] == 0


class TestIndex:
    def test_round_trip(self, tmp_path: Path) -> None:
        with IndexWriter(tmp_path) as writer:
            for number in range(100):
                model, endpoint = writer.model(f"m{number % 3}"), writer.endpoint("/v1/completions")
                fields = (
                    number * 10,
                    9,
                    number + 1,
                    2**32 - 1,
                    2**64 - 1 - number,
                    model,
                    endpoint,
                )
                records = np.array([(*fields, number)], DTYPE)
                writer.extend(records, np.arange(number, dtype=np.uint32))
            writer.finish()

        index = Index.load(tmp_path)

        assert len(index) == 100
        assert index.models == ("m0", "m1", "m2")
        assert index.endpoints == ("/v1/completions",)
        assert index.records[7].tolist() == (70, 9, 8, 2**32 - 1, 2**64 - 8, 1, 0, 7)
        assert index.prefixes[:6].tolist() == [0, 0, 1, 0, 1, 2]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "index.bin").unlink(),
            lambda folder: (folder / "index.json").unlink(),
            lambda folder: (folder / "index.json").write_text("{"),
            lambda folder: (folder / "index.json").write_text("[]"),
            lambda folder: (folder / "index.json").write_text('{"version": 99}'),
            lambda folder: (folder / "index.bin").write_bytes(b"short"),
            lambda folder: (folder / "index.bin").write_bytes(b""),
            lambda folder: (folder / "prefixes.bin").unlink(),
            lambda folder: (folder / "prefixes.bin").write_bytes(b"four"),
        ],
    )
    def test_damage_is_told(self, tmp_path: Path, damage: object) -> None:
        path = tmp_path / "input.jsonl"
        path.write_bytes(lines(10))
        index_file(path, tmp_path, RULES)
        assert callable(damage)
        damage(tmp_path)

        with pytest.raises(IndexUnreadable):
            Index.load(tmp_path)
