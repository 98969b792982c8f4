"""API keys: their text, what the store keeps of them, and how soon a change of them is seen."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batch_app import access as access_module
from batch_app.access import Access, KeyChanges, has_keys
from batch_app.cli import app
from batch_app.config import Settings
from batch_app.errors import Forbidden, NotFound, Unauthenticated
from batch_app.files import DataDir
from batch_app.keys import (
    ApiKey,
    Scope,
    checksum,
    digest,
    form_token,
    is_form_token,
    is_token_of,
    key_id_of,
    new_key,
    new_session,
)
from batch_app.store import Store

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Place:
    """A data folder with a store, a clock to turn, and the access of a server that serves it."""

    def __init__(self, root: Path, **settings: object) -> None:
        self.settings = Settings(data_dir=root, **settings)  # type: ignore[arg-type]
        self.data = DataDir(root)
        self.data.create()
        self.store = Store(self.settings.resolved_database_url)
        self.store.migrate()
        self.now = NOW
        self.access = self.another_server()

    def another_server(self) -> Access:
        return Access(self.settings, self.data, self.store, lambda: self.now)

    def add(self, **options: object) -> tuple[ApiKey, str]:
        key, token = new_key("ana", [Scope.READ], NOW, **options)  # type: ignore[arg-type]
        self.store.add_key(key)
        KeyChanges(self.data.key_changes_file).note()
        return key, token


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "data")
    yield place
    place.store.close()


def test_a_key_s_text() -> None:
    key, token = new_key("ana", [Scope.READ, Scope.WRITE], NOW)
    assert re.fullmatch(r"vbk_[0-9a-f]{12}_[0-9a-f]{56}", token)
    assert 4 * len(token.rsplit("_", 1)[1][:-8]) >= 160
    assert key_id_of(token) == key.id
    assert is_token_of(token, key)
    assert token not in repr(key)
    assert token.rsplit("_", 1)[1] not in repr(key)
    assert len({new_key("ana", [Scope.READ], NOW)[1] for _ in range(100)}) == 100


def test_a_mistyped_key_is_none() -> None:
    _, token = new_key("ana", [Scope.READ], NOW)
    for place in range(len(token)):
        wrong = token[:place] + ("0" if token[place] != "0" else "1") + token[place + 1 :]
        assert key_id_of(wrong) is None, place
    for other in ("", "none", "sk-proj-1234", token[:-1], token + "0", token.upper(), f" {token}"):
        assert key_id_of(other) is None


def test_another_secret_under_the_same_id_is_not_the_key() -> None:
    key, token = new_key("ana", [Scope.READ], NOW)
    start = f"{token[:17]}{'0' * 48}"
    forged = start + checksum(start)
    assert key_id_of(forged) == key.id
    assert not is_token_of(forged, key)


def test_a_key_is_compared_in_a_time_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    key, token = new_key("ana", [Scope.READ], NOW)
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert is_token_of(token, key)
    assert not is_token_of(token[:-1] + "x", key)
    assert [other for _, other in compared] == [key.digest] * 2


def test_a_key_that_could_do_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="read or write"):
        new_key("ana", [Scope.ADMIN], NOW)


def test_no_keys_means_none_is_asked_for_until_the_first(place: Place) -> None:
    assert place.access.is_required() is False
    assert place.access.is_required_here() is False
    key, _ = place.add()
    assert place.access.is_required_here() is None  # has to look again at once
    assert place.access.is_required() is True
    place.store.revoke_key(key.id, NOW)
    assert place.another_server().is_required() is True  # the last one's end opens nothing


def test_no_auth_asks_for_none(tmp_path: Path) -> None:
    place = Place(tmp_path / "open", no_auth=True)
    place.add()
    assert place.access.is_required() is False
    place.store.close()


def test_who_a_key_is(place: Place) -> None:
    key, token = place.add()
    caller = place.access.caller(token)
    assert (caller.owner, caller.key_id, caller.sees_all) == (key.id, key.id, False)
    other, _ = place.add(owner=key.owner)
    assert other.caller.owner == caller.owner


@pytest.mark.parametrize("wrong", ["none", "", "vbk_000000000000_" + "0" * 56])
def test_what_is_no_key_of_ours(place: Place, wrong: str) -> None:
    place.add()
    with pytest.raises(Unauthenticated) as refusal:
        place.access.caller(wrong)
    assert refusal.value.key_id is None
    if wrong:
        assert wrong not in refusal.value.message


def test_the_right_id_with_another_secret(place: Place) -> None:
    _, token = place.add()
    start = f"{token[:17]}{'0' * 48}"
    with pytest.raises(Unauthenticated, match="no such"):
        place.access.caller(start + checksum(start))


def test_a_revoked_key_opens_nothing_at_once(place: Place) -> None:
    key, token = place.add()
    assert place.access.caller(token)
    assert place.access.caller_here(token)
    place.store.revoke_key(key.id, NOW)
    KeyChanges(place.data.key_changes_file).note()
    assert place.access.caller_here(token) is None
    with pytest.raises(Unauthenticated, match="revoked") as refusal:
        place.access.caller(token)
    assert refusal.value.key_id == key.id


def test_on_another_folder_a_revoked_key_is_good_for_a_second_at_most(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = place.add()
    moment = [100.0]
    monkeypatch.setattr(access_module.time, "monotonic", lambda: moment[0])
    assert place.access.caller(token)
    place.store.revoke_key(key.id, NOW)  # and no change is noted here
    assert place.access.caller(token)
    moment[0] += access_module.BELIEVED_S
    with pytest.raises(Unauthenticated, match="revoked"):
        place.access.caller(token)


def test_a_key_ends_at_its_time_also_while_it_is_remembered(place: Place) -> None:
    _, token = place.add(expires_at=NOW + timedelta(minutes=1))
    assert place.access.caller(token)
    place.now = NOW + timedelta(minutes=1)
    assert place.access.caller_here(token) is None
    with pytest.raises(Unauthenticated, match="expired"):
        place.access.caller(token)


def test_the_store_is_not_asked_again_within_the_second(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, token = place.add()
    place.access.caller(token)
    place.access.is_required()
    monkeypatch.setattr(place.store, "get_key", None)
    monkeypatch.setattr(place.store, "has_keys", None)
    assert place.access.caller(token)
    assert place.access.is_required()


def test_last_use_is_noted(place: Place) -> None:
    key, token = place.add()
    place.access.caller(token)
    assert place.store.get_key(key.id).last_used_at is None
    place.access.note_uses()
    assert place.store.get_key(key.id).last_used_at == NOW
    place.store.note_key_uses({key.id: NOW - timedelta(days=1)})  # another server's, late
    assert place.store.get_key(key.id).last_used_at == NOW


def test_looking_for_keys_makes_no_database(tmp_path: Path) -> None:
    assert has_keys(Settings(data_dir=tmp_path / "none")) is False
    assert not (tmp_path / "none").exists()


# -- the command line ------------------------------------------------------------------------------


def keys(root: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(root)])
    return result.exit_code, result.stdout, result.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    code, token, said = keys(tmp_path, "create", "ana")
    assert code == 0
    assert key_id_of(token.strip()), "nothing but the key on stdout"
    assert "first" in said

    code, out, said = keys(
        tmp_path, "create", "bob", "--scope", "read", "--expires", "3d", "--json"
    )
    made = json.loads(out)
    assert code == 0
    assert made["scopes"] == ["read"]
    assert made["expires_at"]
    assert key_id_of(made["key"]) == made["id"]
    assert "first" not in said

    code, table, _ = keys(tmp_path, "list")
    assert table.count("active") == 2
    for secret in (token.strip(), made["key"]):
        assert secret.rsplit("_", 1)[1] not in table

    code, _, said = keys(tmp_path, "revoke", made["id"])
    assert code == 0
    assert "bob" in said
    listed = json.loads(keys(tmp_path, "list", "--json")[1])
    assert [key["state"] for key in listed] == ["active", "revoked"]
    assert "key" not in listed[0]

    for path in tmp_path.rglob("*"):
        if path.is_file():
            for secret in (token.strip(), made["key"]):
                assert secret.rsplit("_", 1)[1].encode() not in path.read_bytes(), path
    deeds = [json.loads(line) for line in (tmp_path / "logs/audit.jsonl").read_text().splitlines()]
    assert [deed["action"] for deed in deeds] == ["create_key", "create_key", "revoke_key"]
    assert deeds[2]["object_id"] == made["id"]


def test_where_no_server_ever_ran_nothing_is_made(tmp_path: Path) -> None:
    for arguments in (("list",), ("revoke", "key_000000000000")):
        code, out, said = keys(tmp_path / "data", *arguments)
        assert (code, out) == (4, "")
        assert "--data-dir" in said
    assert list(tmp_path.iterdir()) == []


def test_only_a_key_that_is_there_is_revoked(tmp_path: Path) -> None:
    keys(tmp_path, "create", "ana")
    for name, words in (("key_000000000000", "No such key"), ("ana", "keys list")):
        code, _, said = keys(tmp_path, "revoke", name)
        assert code == 4
        assert words in said


def test_a_key_that_replaces_another_sees_the_same(tmp_path: Path) -> None:
    first = json.loads(keys(tmp_path, "create", "ana", "--json")[1])
    second = json.loads(keys(tmp_path, "create", "ana", "--replaces", first["id"], "--json")[1])
    assert second["owner"] == first["owner"]
    assert second["id"] != first["id"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("create", ""), 3, "characters"),
        (("create", "a\nb"), 3, "characters"),
        (("create", "ana", "--expires", "soon"), 3, "90d"),
        (("create", "ana", "--expires", "0d"), 3, "90d"),
        (("create", "ana", "--scope", "admin"), 3, "--scope read"),
        (("create", "ana", "--replaces", "key_000000000000"), 4, "No such key"),
        (("revoke", "key_000000000000"), 4, "There is no database"),
    ],
)
def test_bad_wishes_are_said_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    ended_with, out, said = keys(tmp_path, *arguments)
    assert ended_with == code
    assert out == ""
    assert words in said
    assert len(said.strip().splitlines()) == 1


# -- sign-ins --------------------------------------------------------------------------------------


def test_a_session_opens_what_its_key_opens(place: Place) -> None:
    key, token = place.add()
    held = place.access.sign_in(token, life_s=60)
    assert held not in token
    assert place.access.caller(held) == key.caller
    assert held.encode() not in (place.settings.sqlite_file).read_bytes()
    assert place.another_server().caller(held) == key.caller

    place.now += timedelta(seconds=61)
    for server in (place.access, place.another_server()):
        with pytest.raises(Unauthenticated):
            server.caller(held)
    assert place.access.caller(token) == key.caller, "the key itself goes on"


def test_a_session_ends_with_its_key_and_at_sign_out(place: Place) -> None:
    key, token = place.add()
    other = place.another_server()
    held = place.access.sign_in(token, life_s=60)
    gone = place.access.sign_in(token, life_s=60)
    assert other.caller(gone) == key.caller
    place.access.sign_out(gone)
    for server in (place.access, other):
        assert server.caller_here(gone) is None
        with pytest.raises(Unauthenticated):
            server.caller(gone)
    assert other.caller(held) == key.caller
    place.store.revoke_key(key.id, NOW)
    KeyChanges(place.data.key_changes_file).note()
    with pytest.raises(Unauthenticated, match="revoked"):
        other.caller(held)


def test_who_may_not_sign_in(place: Place) -> None:
    _, token = place.add()
    held = place.access.sign_in(token, life_s=60)
    for wrong in (held, "", "none", token[:-1]):
        with pytest.raises(Unauthenticated):
            place.access.sign_in(wrong, life_s=60)
    blind, blind_token = new_key("ben", [Scope.WRITE], NOW)
    place.store.add_key(blind)
    with pytest.raises(Forbidden):
        place.access.sign_in(blind_token, life_s=60)


def test_sessions_that_ran_out_are_forgotten(place: Place) -> None:
    _, token = place.add()
    held = place.access.sign_in(token, life_s=60)
    place.now += timedelta(seconds=120)
    place.access.sign_in(token, life_s=60)
    with pytest.raises(NotFound):
        place.store.get_session(digest(held))


def test_a_form_s_token_belongs_to_its_session() -> None:
    key, _ = new_key("ana", [Scope.READ], NOW)
    (_, one), (_, two) = new_session(key, NOW, 60), new_session(key, NOW, 60)
    assert is_form_token(form_token(one), one)
    assert not is_form_token(form_token(two), one)
    assert not is_form_token("", one)
    assert not is_form_token("é", one)
