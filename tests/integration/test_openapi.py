"""/openapi.json tells the truth: what it declares is what the app answers, whatever is asked.

Schemathesis makes the requests from the document and compares each answer with it: no 5xx, no
status, content type or shape that isn't declared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.sdk import CHAT, jsonl, line
from support.stories import World

pytestmark = pytest.mark.long

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("openapi")) as world:
        world.services.stopping.set()  # so that a log isn't followed for ever
        yield world


@pytest.fixture(scope="module")
def real(world: World) -> dict[str, list[str]]:
    """Ids of what exists, by the name of the path parameter; without them all would be 404."""
    client = world.client
    content = jsonl([line("a"), line("b", "tiny-context", "one two three four")])
    found: dict[str, list[str]] = {"batch_id": [], "file_id": [], "upload_id": [], "model": ["sim"]}
    for state in ("completed", "failed", "in_progress", "validating"):
        raw = b"{}\n" if state == "failed" else content
        form = {"files": {"file": ("in.jsonl", raw)}, "data": {"purpose": "batch"}}
        file_id = client.post("/v1/files", **form).json()["id"]
        wish = {"input_file_id": file_id, "endpoint": CHAT}
        batch_id = client.post("/v1/batches", json=wish).json()["id"]
        if state != "validating":
            world.validate()
        if state == "completed":
            world.work()
        batch = client.get(f"/v1/batches/{batch_id}").json()
        assert batch["status"] == state
        found["batch_id"].append(batch_id)
        found["file_id"] += [file_id, *filter(None, [batch["output_file_id"]])]
    form = {"files": {"file": ("in.jsonl", content)}, "data": {"model": "sim"}}
    found["batch_id"].append(client.post("/v1/batches", **form).json()["batch_id"])
    wish = {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
    for _ in range(2):
        found["upload_id"].append(client.post("/v1/uploads", json=wish).json()["id"])
    client.post(f"/v1/uploads/{found['upload_id'][0]}/cancel")
    webhook_id = client.post("/v1/webhooks", json={"url": "https://example.org/"}).json()["id"]
    client.delete(f"/v1/batches/{client.post('/v1/batches', **form).json()['batch_id']}")
    deliveries = client.get(f"/v1/webhooks/{webhook_id}/deliveries").json()["data"]
    found["webhook_id"] = [webhook_id]
    found["delivery_id"] = [delivery["id"] for delivery in deliveries]
    return found


def test_parts_of_a_download_are_declared(world: World, real: dict[str, list[str]]) -> None:
    """The document has no parameter for Range, so that nothing asks for one by itself."""
    paths = world.client.get("/openapi.json").json()["paths"]
    for path, its_id in (
        ("/v1/files/{file_id}/content", real["file_id"][0]),
        ("/v1/batches/{batch_id}/results", real["batch_id"][0]),
    ):
        declared = paths[path]["get"]["responses"]
        for wanted, status in (("bytes=0-1", 206), ("bytes=0-1,4-5", 206), ("bytes=999999-", 416)):
            answer = world.client.get(
                path.format(file_id=its_id, batch_id=its_id),
                headers={"Range": wanted},
            )
            assert answer.status_code == status
            kind = answer.headers["content-type"].split(";")[0]
            assert kind in declared[str(status)]["content"]


@pytest.mark.timeout(400)  # many requests of each route
def test_every_answer_is_declared(world: World, real: dict[str, list[str]]) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", as_localhost(world.client.app))
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    operations.sort(key=lambda operation: operation.method == "delete")  # the others need files
    lies = {}
    for operation in operations:
        for mode in modes(operation):
            try:
                ask(operation, mode, real)
            except hypothesis.errors.Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # nothing in it can be wrong
            except BaseException as error:
                lies[operation.label] = error
    for label, error in lies.items():
        print(f"\n== {label}\n{error!r}")
        for inner in getattr(error, "exceptions", ()):
            print(inner)
    assert not lies


def modes(operation: Any) -> tuple[GenerationMode, ...]:
    """What is right by the document, and what is wrong by it. In a path any text is right: where
    there is nothing else, looking for something wrong takes seconds, and finds nothing."""
    can_be_wrong = any(
        list(part)
        for part in (operation.query, operation.headers, operation.cookies, operation.body)
    )
    return tuple(GenerationMode) if can_be_wrong else (GenerationMode.POSITIVE,)


def as_localhost(app: Any, token: str | None = None) -> Any:
    """Schemathesis calls the app by a name of its own, which isn't answered, and with no key."""
    sent = [(b"host", b"localhost")]
    if token is not None:
        sent.append((b"authorization", f"Bearer {token}".encode()))

    async def called(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            ours = (b"host", b"authorization")
            headers = [(name, value) for name, value in scope["headers"] if name not in ours]
            scope = scope | {"headers": [*sent, *headers]}
        await app(scope, receive, send)

    return called


def ask(
    operation: Any, mode: GenerationMode, real: dict[str, list[str]], examples: int = EXAMPLES
) -> None:
    """Ask what is right by the document (positive), or what is wrong by it."""

    @hypothesis.seed(20260101)
    @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(
        case=operation.as_strategy(generation_mode=mode),
        which=st.integers(0, 8),
        real_id=st.booleans(),
    )
    def asked(case: Any, which: int, real_id: bool) -> None:
        if real_id:
            for name in case.path_parameters or {}:
                case.path_parameters[name] = real[name][which % len(real[name])]
            if isinstance(case.body, dict) and "input_file_id" in case.body:
                case.body["input_file_id"] = real["file_id"][which % len(real["file_id"])]
        case.call_and_validate(checks=CHECKS)

    asked()


def test_the_document_has_no_dangling_reference(world: World) -> None:
    document = world.client.get("/openapi.json").json()
    text = json.dumps(document)
    references = {piece.split('"', 1)[0] for piece in text.split('"$ref": "')[1:]}
    assert references
    for reference in references:
        assert reference.startswith("#/components/schemas/"), reference
        assert reference.rsplit("/", 1)[1] in document["components"]["schemas"]


def test_the_docs_need_no_network(world: World) -> None:
    page = world.client.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    for piece in page.text.split('src="')[1:]:
        assert world.client.get(piece.split('"', 1)[0]).status_code == 200
