"""No route asks the store for what somebody owns without saying for whom."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from batch_app.store import Store

APP = Path(__file__).parents[2] / "batch_app"
SOURCES = sorted([*(APP / "routes").glob("*.py"), *(APP / "dashboard").glob("*.py")])
FILTERED = {
    name
    for name, method in inspect.getmembers(Store, inspect.isfunction)
    if "seen_by" in inspect.signature(method).parameters
}


def unfiltered_calls(source: str) -> list[str]:
    """Calls of filtered methods of a store that don't name the caller, also through a thread."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        callees = [node.func, *node.args]
        names = {
            part.attr
            for part in callees
            if isinstance(part, ast.Attribute) and ast.unparse(part.value).endswith("store")
        }
        if names & FILTERED and all(word.arg != "seen_by" for word in node.keywords):
            found.append(ast.unparse(node))
    return found


def test_every_question_names_the_caller() -> None:
    assert {"get_batch", "list_batches", "get_file", "list_files", "get_upload"} <= FILTERED
    assert len(SOURCES) > 20
    for path in SOURCES:
        assert unfiltered_calls(path.read_text(encoding="utf-8")) == [], path.name


def test_the_check_itself_finds_what_it_should() -> None:
    for call in (
        "own.store.get_batch(batch_id)",
        "services(request).store.list_files(limit=3)",
        "run_in_threadpool(own.store.get_batch, batch.id)",
    ):
        assert unfiltered_calls(call) == [call]
    assert unfiltered_calls("own.store.get_batch(batch_id, seen_by=asks)") == []
    assert unfiltered_calls("own.store.ping()") == []
