"""The document stays true once there are API keys: for a good key, and for none."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode

from batch_app.access import KeyChanges
from batch_app.core import utc_now
from batch_app.keys import Scope, new_key
from batch_app.routes.authentication import is_open
from integration.test_openapi import as_localhost, ask, modes, real
from support.stories import World

pytestmark = pytest.mark.long

__all__ = ["real"]

EXAMPLES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("openapi-with-keys")) as world:
        world.services.stopping.set()  # so that a log isn't followed for ever
        yield world


@pytest.fixture(scope="module")
def token(world: World) -> str:
    key, token = new_key("test", [Scope.READ, Scope.WRITE], utc_now())
    world.store.add_key(key)
    KeyChanges(world.data.key_changes_file).note()
    world.client.headers["authorization"] = f"Bearer {token}"
    return token


@pytest.mark.parametrize("with_key", [True, False])
def test_every_answer_is_declared(
    world: World, token: str, with_key: bool, request: pytest.FixtureRequest
) -> None:
    known = request.getfixturevalue("real")  # made with the key
    app = as_localhost(world.client.app, token if with_key else None)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    operations.sort(key=lambda operation: operation.method == "delete")
    lies = {}
    for operation in operations:
        for mode in modes(operation):
            try:
                ask(operation, mode, known, EXAMPLES if with_key else 2)
            except hypothesis.errors.Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # nothing in it can be wrong
            except BaseException as error:
                lies[operation.label] = error
    assert not lies


def test_the_document_says_who_has_to_bring_a_key(world: World, token: str) -> None:
    client = world.client
    client.get("/v1/models")
    document = client.get("/openapi.json").json()
    [name] = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][name]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if is_open(path):
                assert operation["security"] == []
                continue
            assert operation["security"] == [{name: []}]
            needed = "read" if method == "get" else "write"
            assert operation["x-required-scopes"][0] == needed
            assert {"401", "403"} <= set(operation["responses"])
            assert method == "get" or {"408", "415", "429"} <= set(operation["responses"])


def test_without_keys_it_says_that_none_is_needed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with World(tmp_path_factory.mktemp("openapi-without-keys")) as world:
        operation = world.client.get("/openapi.json").json()["paths"]["/v1/batches"]["get"]
        assert {} in operation["security"]
