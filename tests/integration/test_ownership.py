"""Two keys, and several that may do less: what each of them gets from every route of the app.

The routes are taken from the app itself. One without an entry in `ROUTES` fails the test, and so
does one that answers somebody whom it should not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, Route

from batch_app.access import KeyChanges
from batch_app.core import utc_now
from batch_app.keys import ApiKey, Scope, new_key
from support.sdk import CHAT, jsonl, line
from support.stories import World

ABSENT = "0" * 24
Answer = httpx.Response


@dataclass
class Person:
    """Somebody who calls, with or without a key."""

    world: World
    token: str | None
    key: ApiKey | None = None

    def call(self, method: str, path: str, **options: Any) -> Answer:
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        return self.world.client.request(method, path, headers=headers, **options)

    def made(self, path: str, **options: Any) -> dict[str, Any]:
        answer = self.call("POST", path, **options)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body


@dataclass
class Belongings:
    """What one person has on the server: of each kind, ids in the states that routes need."""

    person: Person
    ids: dict[str, str] = field(default_factory=dict)

    def file(self) -> str:
        form = {
            "files": {
                "file": (
                    "in.jsonl",
                    jsonl([line("a"), line("b", "tiny-context", "one two three four")]),
                )
            },
            "data": {"purpose": "batch"},
        }
        return str(self.person.made("/v1/files", **form)["id"])

    def batch(self) -> str:
        wish = {"input_file_id": self.file(), "endpoint": CHAT}
        return str(self.person.made("/v1/batches", json=wish)["id"])

    def queued_batch(self) -> str:
        form = {"files": {"file": ("in.jsonl", jsonl([line("a")]))}, "data": {"model": "sim"}}
        return str(self.person.made("/v1/batches", **form)["batch_id"])

    def finished_batch(self) -> str:
        """Of which one request failed."""
        batch_id = self.batch()
        while self.person.world.validate():
            pass
        while self.person.world.work():
            pass
        batch = self.person.call("GET", f"/v1/batches/{batch_id}").json()
        assert batch["status"] == "completed"
        assert batch["error_file_id"]
        self.ids["output"] = batch["output_file_id"]
        return batch_id

    def webhook(self) -> str:
        made = self.person.made("/v1/webhooks", json={"url": "https://example.org/hook"})
        return str(made["id"])

    def delivery(self) -> str:
        """With the id of its webhook, as the path has both."""
        wish = {"input_file_id": self.file(), "endpoint": CHAT}
        made = self.person.made("/v1/batches", json=wish | {"webhook_url": "https://example.org/"})
        self.person.made(f"/v1/batches/{made['id']}/cancel")
        while self.person.world.keep_house():
            pass
        path = f"{made['webhook']['id']}/deliveries"
        (delivery,) = self.person.call("GET", f"/v1/webhooks/{path}").json()["data"]
        return f"{path}/{delivery['id']}"

    def upload(self) -> str:
        wish = {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
        return str(self.person.made("/v1/uploads", json=wish)["id"])

    def part(self, upload_id: str) -> str:
        return str(self.person.made(f"/v1/uploads/{upload_id}/parts", files=PART)["id"])

    def key(self) -> str:
        key, _ = new_key("another", [Scope.READ], utc_now())
        self.person.world.store.add_key(key)
        return key.id


PART = {"data": ("p", b"four")}


@dataclass(frozen=True)
class Ask:
    """A request of a route: for what, and how. `needs` makes the thing of the path's id."""

    needs: Callable[[Belongings], str] | None = None
    options: Callable[[Belongings, str], dict[str, Any]] = lambda own, thing: {}
    open: bool = False
    admin_only: bool = False
    lists: str | None = None
    path: str | None = None


def of_all(request: Callable[[], dict[str, Any]]) -> Callable[[Belongings, str], dict[str, Any]]:
    return lambda own, thing: request()


FORM = {"files": {"file": ("in.jsonl", jsonl([line("a")]))}}
ROUTES: dict[str, Ask] = {
    "GET /livez": Ask(open=True),
    "GET /readyz": Ask(open=True),
    "GET /health": Ask(open=True),
    "GET /docs": Ask(open=True),
    "GET /docs/oauth2-redirect": Ask(open=True),
    "GET /redoc": Ask(open=True),
    "GET /openapi.json": Ask(open=True),
    "MOUNT /static-offline-docs": Ask(open=True, path="/static-offline-docs/favicon.png"),
    "GET /metrics": Ask(admin_only=True),
    "GET /v1/models": Ask(),
    "GET /v1/models/{model:path}": Ask(path="/v1/models/sim"),
    "POST /v1/batches": Ask(
        Belongings.file,
        lambda own, thing: {"json": {"input_file_id": thing, "endpoint": CHAT}},
    ),
    "GET /v1/batches": Ask(Belongings.batch, lists="/v1/batches?limit=100"),
    "GET /v1/batches/{batch_id}": Ask(Belongings.batch),
    "DELETE /v1/batches/{batch_id}": Ask(Belongings.batch),
    "POST /v1/batches/{batch_id}/cancel": Ask(Belongings.batch),
    "POST /v1/batches/{batch_id}/retry": Ask(Belongings.finished_batch),
    "GET /v1/batches/{batch_id}/results": Ask(Belongings.finished_batch),
    "GET /v1/batches/{batch_id}/logs": Ask(Belongings.batch),
    "POST /v1/estimate": Ask(
        Belongings.file, lambda own, thing: {"json": {"input_file_id": thing}}
    ),
    "GET /v1/benchmarks": Ask(admin_only=True),  # as the page of the models has it
    "POST /v1/files": Ask(None, lambda own, thing: FORM | {"data": {"purpose": "batch"}}),
    "GET /v1/files": Ask(Belongings.file, lists="/v1/files"),
    "GET /v1/files/{file_id}": Ask(Belongings.file),
    "GET /v1/files/{file_id}/content": Ask(Belongings.file),
    "DELETE /v1/files/{file_id}": Ask(Belongings.file),
    "POST /v1/uploads": Ask(
        None,
        lambda own, thing: {
            "json": {"filename": "u", "purpose": "batch", "bytes": 4, "mime_type": "text/plain"}
        },
    ),
    "GET /v1/uploads/{upload_id}": Ask(Belongings.upload),
    "GET /v1/uploads/{upload_id}/parts": Ask(Belongings.upload),
    "POST /v1/uploads/{upload_id}/parts": Ask(
        Belongings.upload, lambda own, thing: {"files": PART}
    ),
    "POST /v1/uploads/{upload_id}/complete": Ask(
        Belongings.upload, lambda own, thing: {"json": {"part_ids": [own.part(thing)]}}
    ),
    "POST /v1/uploads/{upload_id}/cancel": Ask(Belongings.upload),
    "POST /v1/webhooks": Ask(
        None, lambda own, thing: {"json": {"url": "https://example.org/hook"}}
    ),
    "GET /v1/webhooks": Ask(Belongings.webhook, lists="/v1/webhooks?limit=100"),
    "GET /v1/webhooks/{webhook_id}": Ask(Belongings.webhook),
    "DELETE /v1/webhooks/{webhook_id}": Ask(Belongings.webhook),
    "GET /v1/webhooks/{webhook_id}/deliveries": Ask(Belongings.webhook),
    "POST /v1/webhooks/{webhook_id}/test": Ask(Belongings.webhook),
    "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": Ask(
        Belongings.delivery, path="/v1/webhooks/{thing}/replay"
    ),
}

# The pages, as programs see them: with an API key.
ROUTES |= {
    "MOUNT /static": Ask(open=True, path="/static/style.css"),
    "GET /sign-in": Ask(open=True),
    "GET /": Ask(Belongings.batch, lists="/"),
    "GET /batches/{batch_id}": Ask(Belongings.batch),
    "GET /batches/{batch_id}/throughput.svg": Ask(Belongings.batch),
    "GET /events": Ask(Belongings.batch, path="/events?batch={thing}"),
    "POST /batches/{batch_id}/cancel": Ask(Belongings.batch),
    "POST /batches/{batch_id}/retry": Ask(Belongings.finished_batch),
    "GET /submit": Ask(),
    "GET /models": Ask(),
    "GET /models/accuracy.svg": Ask(admin_only=True, path="/models/accuracy.svg?model=sim"),
    "GET /machine": Ask(),
    "GET /keys": Ask(admin_only=True),
    "POST /keys": Ask(
        None, of_all(lambda: {"data": {"name": "x", "scope": "read"}}), admin_only=True
    ),
    "POST /keys/{key_id}/revoke": Ask(Belongings.key, admin_only=True, path="/keys/{thing}/revoke"),
}
#: They deal in cookies; acceptance/test_dashboard.py asks them.
OF_BROWSERS = {"POST /sign-in", "POST /sign-out"}


def routes_of(app: Any) -> Iterator[str]:
    for route in app.routes:
        if isinstance(route, Mount):
            yield f"MOUNT {route.path}"
        else:
            assert isinstance(route, Route), f"what is {route}?"
            for method in (route.methods or set()) - {"HEAD"}:
                yield f"{method} {route.path}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("ownership")) as world:
        world.services.stopping.set()  # so that a log isn't followed for ever
        yield world


@dataclass
class People:
    world: World

    def __post_init__(self) -> None:
        both = (Scope.READ, Scope.WRITE)
        self.ana = self.with_key(*both)
        self.bob = self.with_key(*both)
        assert self.ana.key
        self.ana_reads = self.with_key(Scope.READ, owner=self.ana.key.owner)
        self.ana_writes = self.with_key(Scope.WRITE, owner=self.ana.key.owner)
        self.admin = self.with_key(*both, Scope.ADMIN)
        self.admin_reads = self.with_key(Scope.READ, Scope.ADMIN)
        self.revoked = self.with_key(*both, Scope.ADMIN, owner=self.ana.key.owner)
        assert self.revoked.key
        self.world.store.revoke_key(self.revoked.key.id, utc_now())
        KeyChanges(self.world.data.key_changes_file).note()
        past = utc_now() - timedelta(seconds=1)
        self.expired = self.with_key(*both, owner=self.ana.key.owner, expires_at=past)
        self.stranger = Person(self.world, None)
        self.guesser = Person(self.world, "none")

    def with_key(self, *scopes: Scope, **options: Any) -> Person:
        key, token = new_key("test", scopes, utc_now(), **options)
        self.world.store.add_key(key)
        KeyChanges(self.world.data.key_changes_file).note()
        return Person(self.world, token, key)


@pytest.fixture(scope="module")
def people(world: World) -> People:
    return People(world)


def ask(person: Person, route: str, thing: str, options: dict[str, Any]) -> Answer:
    method, path = route.split(" ", 1)
    method = "GET" if method == "MOUNT" else method
    path = ROUTES[route].lists or ROUTES[route].path or path
    for name in ("{batch_id}", "{file_id}", "{upload_id}", "{webhook_id}", "{thing}"):
        path = path.replace(name, thing)
    return person.call(method, path, **options)


def test_every_route_has_its_entry(world: World) -> None:
    assert set(routes_of(world.client.app)) == set(ROUTES) | OF_BROWSERS


@pytest.mark.parametrize("route", ROUTES)
def test_what_each_of_them_gets(people: People, route: str) -> None:
    entry = ROUTES[route]
    own = Belongings(people.ana)
    thing = entry.needs(own) if entry.needs else ""
    options = entry.options(own, thing)
    if entry.open:
        for person in (people.stranger, people.guesser, people.revoked, people.ana):
            assert ask(person, route, thing, options).status_code == 200
        return

    before = state_of(people)
    for person in (people.stranger, people.guesser, people.revoked, people.expired):
        answer = ask(person, route, thing, options)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"].startswith("Bearer ")
        assert thing == "" or thing not in answer.text

    reads = route.startswith("GET")
    for person in (people.ana_writes,) if reads else (people.ana_reads, people.admin_reads):
        answer = ask(person, route, thing, options)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]

    if entry.admin_only:
        for person in (people.ana, people.bob, people.ana_reads):
            assert ask(person, route, thing, options).status_code == 403
        for person in (people.admin, people.admin_reads) if reads else (people.admin,):
            assert ask(person, route, thing, options).status_code == 200
        return

    answer = ask(people.bob, route, thing, options)
    if entry.lists:
        assert answer.status_code == 200
        assert thing not in answer.text
    elif thing:
        assert answer.status_code == 404
        absent = thing[:-24] + ABSENT
        other = entry.options(own, thing) if "json" not in options else options
        if "json" in options:
            other = {"json": json.loads(json.dumps(options["json"]).replace(thing, absent))}
        known_to_nobody = ask(people.bob, route, absent, other)
        assert known_to_nobody.status_code == 404
        assert known_to_nobody.text.replace(absent, thing) == answer.text
    assert thing == "" or state_of(people) == before, "somebody changed something"

    for person in (people.ana_reads, people.admin_reads) if reads else ():
        answer = ask(person, route, thing, options)
        assert answer.status_code == 200
        assert not entry.lists or thing in answer.text

    if entry.needs:  # each of the two needs one that the other has not used up
        thing_for_admin = entry.needs(own)
        answer = ask(people.admin, route, thing_for_admin, entry.options(own, thing_for_admin))
        assert answer.status_code == 200, answer.text
        assert not entry.lists or thing_for_admin in answer.text
    answer = ask(people.ana, route, thing, options)
    assert answer.status_code == 200, answer.text


def state_of(people: People) -> Any:
    """All that the admin can see of everything."""
    admin = people.admin
    batches = admin.call("GET", "/v1/batches?limit=100&format=native").json()
    files = admin.call("GET", "/v1/files").json()
    uploads = sorted(path.name for path in people.world.data.batches.rglob("*"))
    return batches, files, uploads


# -- what the matrix does not see ------------------------------------------------------------------


def test_what_is_made_belongs_to_who_made_it(people: People) -> None:
    store, ana = people.world.store, people.ana
    assert ana.key
    own = Belongings(ana)
    batch = store.get_batch(own.finished_batch())
    assert batch.owner == ana.key.owner
    published = [batch.input_file_id, batch.output_file_id, batch.error_file_id]
    again = ana.made(f"/v1/batches/{batch.id}/retry")
    by_admin = people.admin.made(f"/v1/batches/{batch.id}/retry")
    retried = [store.get_batch(found["id"]) for found in (again, by_admin)]
    upload_id = own.upload()
    part_id = own.part(upload_id)
    file = ana.made(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})["file"]
    queued = store.get_batch(own.queued_batch())
    owners = {found.owner for found in (*retried, queued)}
    files = [*published, file["id"], *(found.input_file_id for found in (*retried, queued))]
    owners |= {store.get_file(file_id).owner for file_id in files if file_id}
    assert owners == {ana.key.owner}
    for file_id in files:
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
            assert people.bob.call("GET", path).status_code == 404
            assert people.ana.call("GET", path).status_code == 200


def test_a_foreign_cursor_is_unknown(people: People) -> None:
    own = Belongings(people.ana)
    for path, thing in [("/v1/batches", own.batch()), ("/v1/files", own.file())]:
        answer = people.bob.call("GET", f"{path}?after={thing}")
        absent = thing[:-24] + ABSENT
        assert answer.status_code == 404
        unknown = people.bob.call("GET", f"{path}?after={absent}")
        assert unknown.text.replace(absent, thing) == answer.text
        assert people.ana.call("GET", f"{path}?after={thing}").status_code == 200


def test_paging_passes_over_what_is_not_one_s_own(people: People) -> None:
    carl = people.with_key(Scope.READ, Scope.WRITE)
    mine = []
    for _ in range(3):
        mine.append(Belongings(carl).batch())
        Belongings(people.ana).batch()
    seen: list[str] = []
    for _ in range(3):
        after = f"&after={seen[-1]}" if seen else ""
        page = carl.call("GET", f"/v1/batches?limit=1{after}").json()
        seen += [batch["id"] for batch in page["data"]]
    assert seen == mine[::-1]
    assert page["has_more"] is False


def test_the_same_idempotency_key_of_two_is_two(people: People) -> None:
    found = []
    for person in (people.ana, people.bob):
        wish = {"input_file_id": Belongings(person).file(), "endpoint": CHAT}
        headers = {"idempotency-key": "run-7"}
        made = [person.made("/v1/batches", json=wish, headers=headers)["id"] for _ in range(2)]
        assert made[0] == made[1]
        found.append(made[0])
    assert found[0] != found[1]


def test_who_may_know_which_batch_holds_a_file(people: People) -> None:
    file_id = Belongings(people.ana).file()
    wish = {"input_file_id": file_id, "endpoint": CHAT}
    batch_id = people.admin.made("/v1/batches", json=wish)["id"]
    assert people.ana.call("GET", f"/v1/batches/{batch_id}").status_code == 404
    answer = people.ana.call("DELETE", f"/v1/files/{file_id}")
    assert answer.status_code == 409
    assert batch_id not in answer.text
    assert batch_id in people.admin.call("DELETE", f"/v1/files/{file_id}").text


def test_what_was_made_before_there_were_keys_is_the_admin_s(people: People) -> None:
    world = people.world
    batch_id = Belongings(people.ana).batch()
    with world._engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE batches SET owner = NULL WHERE id = '{batch_id}'")
    for person, status in [(people.ana, 404), (people.bob, 404), (people.admin, 200)]:
        assert person.call("GET", f"/v1/batches/{batch_id}").status_code == status


def test_several_authorization_headers_are_none(people: People) -> None:
    answer = people.world.client.get(
        "/v1/models",
        headers=[
            ("authorization", f"Bearer {people.ana.token}"),
            ("authorization", f"Bearer {people.bob.token}"),
        ],
    )
    assert answer.status_code == 401


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "{token}"])
def test_other_kinds_of_authorization(people: People, sent: str) -> None:
    headers = {"authorization": sent.format(token=people.ana.token)}
    assert people.world.client.get("/v1/models", headers=headers).status_code == 401


def test_the_kind_may_be_written_in_any_case(people: People) -> None:
    headers = {"authorization": f"bearer {people.ana.token}"}
    assert people.world.client.get("/v1/models", headers=headers).status_code == 200
