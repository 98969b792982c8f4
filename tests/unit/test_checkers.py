"""A file checked by several processes has the same index and errors as one that isn't."""

from __future__ import annotations

import codecs
import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from batch_app import checkers, intake
from batch_app.checkers import CheckerPlaces
from batch_app.core import LineError
from batch_app.errors import BadLines
from batch_app.index import Index
from batch_app.intake import Intake, IntakeRules, IntakeSummary, index_file
from batch_app.registry import ModelEntry, ModelRegistry
from support.waiting import wait_for

RULES = IntakeRules(
    ModelRegistry(
        [
            ModelEntry(name="one", source="one", aliases=("uno",)),
            ModelEntry(name="two", source="two", chat_template_kwargs=("thinking",)),
        ]
    ),
    max_line_bytes=6000,
    max_errors=5,
)


def line(number: int, model: str = "one", **fields: object) -> bytes:
    content = f"What is {number}? " + "Think well. " * (number % 40)
    body = {"model": model, "messages": [{"role": "user", "content": content}]} | fields
    return json.dumps({"custom_id": f"r{number}", "body": body}).encode()


def lines(num: int) -> list[bytes]:
    models = ["one", "uno", "two"]
    return [
        line(number, models[number % 3], max_tokens=1 + number % 7, temperature=number % 2)
        for number in range(num)
    ]


@dataclass
class Taken:
    """What came of a file. The hashes of its contents are keyed: which are equal is what counts."""

    summary: IntakeSummary | None = None
    records: object = None
    equal_contents: object = None
    marks: object = None
    errors: tuple[LineError, ...] = ()
    num_errors: int = 0


def taken(path: Path, folder: Path, places: CheckerPlaces | None) -> Taken:
    folder.mkdir()
    try:
        summary = index_file(path, folder, RULES, places=places)
    except BadLines as error:
        return Taken(errors=tuple(error.errors), num_errors=error.num_errors)
    index = Index.load(folder)
    records = index.records.copy()
    contents = records["content"].tolist()
    records["content"] = 0
    first = {content: place for place, content in reversed(list(enumerate(contents)))}
    equal = [first[content] if content else -1 for content in contents]
    return Taken(summary, records.tolist(), equal, index.prefixes.tolist())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(intake, "FROM_BYTES", 1)


GOOD = lines(400)
BOM = codecs.BOM_UTF8


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\n".join(GOOD), id="good"),
        pytest.param(BOM + b"\r\n\r\n".join(GOOD) + b"\r\n", id="forgiven"),
        pytest.param(b"\n".join(GOOD * 2), id="each id twice"),
        pytest.param(
            b"\n".join([*GOOD[:90], b"{", *GOOD[90:200], b"x" * 90000, *GOOD[200:], b"[]"]),
            id="some bad",
        ),
        pytest.param(b"\n".join([line(7, "three")] * 300), id="more errors than are told"),
        pytest.param(b"\n".join([line(7, "two", chat_template_kwargs={"a": 1})]), id="arguments"),
        pytest.param(codecs.BOM_UTF16_LE + b"\n".join(GOOD), id="another text"),
        pytest.param(b"\n" * 50_000, id="blank"),
        pytest.param(b"x" * 50_000, id="one line"),
    ],
)
def test_the_same_as_in_one_thread(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(content)
    places = CheckerPlaces(2)
    alone = taken(path, tmp_path / "alone", None)
    assert taken(path, tmp_path / "together", places) == alone
    assert places.take() == 2, "the places were given back"


def test_equal_requests_in_different_processes_are_found(tmp_path: Path) -> None:
    body = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    path = tmp_path / "input.jsonl"
    path.write_bytes(
        b"\n".join(json.dumps({"custom_id": f"{n}", "body": body}).encode() for n in range(1000))
    )
    index_file(path, tmp_path, RULES, places=CheckerPlaces(2))
    contents = Index.load(tmp_path).records["content"]
    assert len(contents) == 1000
    assert len(np.unique(contents)) == 1


def test_a_file_that_grows(tmp_path: Path) -> None:
    content = b"\n".join(GOOD)
    rng = random.Random(1)
    path, folder = tmp_path / "input.jsonl", tmp_path / "folder"
    path.touch()
    folder.mkdir()
    check = Intake(path, folder, RULES, CheckerPlaces(2))
    with path.open("ab", buffering=0) as file:
        while content:
            size = rng.randint(1, 5000)
            file.write(content[:size])
            content = content[size:]
            check.grown(file.tell())
        summary = check.finish()
    check.close()
    assert summary == IntakeSummary(400, ("one", "two"), ("/v1/chat/completions",))
    assert Index.load(folder).records["line"].tolist() == list(range(1, 401))


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "batch_app.checker" in child.cmdline()]


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    path, folder = tmp_path / "input.jsonl", tmp_path / "folder"
    path.write_bytes(b"\n".join(GOOD))
    folder.mkdir()
    check = Intake(path, folder, RULES, CheckerPlaces(2))
    check.grown(1)
    for child in children():
        os.kill(child.pid, signal.SIGKILL)
    summary = check.finish()
    check.close()
    assert summary.num_requests == 400
    assert Index.load(folder).records["line"].tolist() == list(range(1, 401))


def test_given_up(tmp_path: Path) -> None:
    path, folder = tmp_path / "input.jsonl", tmp_path / "folder"
    path.write_bytes(b"\n".join(GOOD))
    folder.mkdir()
    places = CheckerPlaces(2)
    check = Intake(path, folder, RULES, places)
    check.grown(path.stat().st_size)
    wait_for(lambda: len(children()) == 2)
    check.close()
    assert not children()
    assert places.take() == 2


def test_where_all_places_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b"\n".join(GOOD))
    places = CheckerPlaces(3)
    assert places.take() == 3
    places.give_back(1)
    assert index_file(path, tmp_path, RULES, places=places).num_requests == 400
    assert places.take() == 0, "one alone gains nothing"
    places.give_back(1)
    assert places.take() == 2
