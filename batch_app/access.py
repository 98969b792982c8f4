"""Who may come in: from the `Authorization` header to the caller, with little asked of the store.

What the store said of a key is believed for a second at most. Whoever makes or revokes a key lets
a file in the data folder grow (`KeyChanges`), and from then on nothing older is believed: so a
revoked key is refused at once by all servers on that folder, and within the second by others.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from batch_app.config import Settings
from batch_app.core import utc_now
from batch_app.errors import Forbidden, NotFound, Unauthenticated
from batch_app.files import DataDir
from batch_app.keys import (
    ApiKey,
    Caller,
    Scope,
    Session,
    digest,
    is_session_token,
    is_token_of,
    key_id_of,
    new_session,
)
from batch_app.store import Store

BELIEVED_S = 1.0
#: Keys that are remembered at once; with more of them in use, the store is asked more often.
MAX_REMEMBERED = 1000


class KeyChanges:
    """Counts the changes of keys, by the length of a file: a look costs microseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def count(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def note(self) -> None:
        """To be called after the store was told. Raises OSError."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, b".")
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Remembered:
    key: ApiKey
    session: Session | None
    changes: int
    until: float

    def refusal(self, now: datetime) -> str | None:
        return _refusal(self.key, self.session, now)


class Access:
    """One per server. Methods whose name ends in `_here` never ask the store, the others block.

    A token is an API key, or what a browser holds in its place after a sign-in (`keys.Session`).
    """

    def __init__(
        self,
        settings: Settings,
        data: DataDir,
        store: Store,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._open = settings.no_auth
        self._store = store
        self._clock = clock
        self._changes = KeyChanges(data.key_changes_file)
        self._known: dict[str, _Remembered] = {}
        self._has_keys = False
        self._no_keys_changes = -1
        self._no_keys_until = 0.0
        self._uses: dict[str, datetime] = {}
        self._lock = threading.Lock()

    # -- is a key asked for? -------------------------------------------------------------------

    def is_required_here(self) -> bool | None:
        """Whether a key is asked for; None: the store has to be asked."""
        if self._open:
            return False
        if self._has_keys:
            return True  # rows of keys are never removed
        if (
            self._no_keys_changes == self._changes.count()
            and time.monotonic() < self._no_keys_until
        ):
            return False
        return None

    def is_required(self) -> bool:
        """Raises StoreUnavailable."""
        here = self.is_required_here()
        if here is not None:
            return here
        changes = self._changes.count()  # before the question, so that no change is missed
        self._has_keys = self._store.has_keys()
        self._no_keys_until = time.monotonic() + BELIEVED_S
        self._no_keys_changes = changes
        return self._has_keys

    # -- who is it? ----------------------------------------------------------------------------

    def caller_here(self, token: str) -> Caller | None:
        """The caller, if this key was seen to be good within the last second."""
        found = self._known.get(digest(token))
        if found is None or time.monotonic() >= found.until:
            return None
        if found.changes != self._changes.count() or found.refusal(self._clock()):
            return None
        return found.key.caller

    def caller(self, token: str) -> Caller:
        """Raises Unauthenticated, with a message that says why; StoreUnavailable."""
        found = self.caller_here(token)
        if found is not None:
            return found
        changes = self._changes.count()
        key, session = self._key_and_session(token)
        now = self._clock()
        refusal = _refusal(key, session, now)
        with self._lock:
            if refusal is not None:
                raise Unauthenticated(f"The API key {key.id} is {refusal}.", key_id=key.id)
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            until = time.monotonic() + BELIEVED_S
            self._known[digest(token)] = _Remembered(key, session, changes, until)
            self._uses[key.id] = now
        return key.caller

    def _key(self, token: str) -> ApiKey:
        key_id = key_id_of(token)
        if key_id is None:
            raise Unauthenticated("That is no API key of this server: it may be cut or mistyped.")
        try:
            key = self._store.get_key(key_id)
        except NotFound:
            key = None
        if key is None or not is_token_of(token, key):
            raise Unauthenticated("There is no such API key.")
        return key

    def _key_and_session(self, token: str) -> tuple[ApiKey, Session | None]:
        if not is_session_token(token):
            return self._key(token), None
        try:
            session = self._store.get_session(digest(token))
            return self._store.get_key(session.key_id), session
        except NotFound:
            raise Unauthenticated("You are not signed in any more.") from None

    # -- sign-ins ------------------------------------------------------------------------------

    def sign_in(self, token: str, life_s: float) -> str:
        """Begin a session for the bearer of this API key. Returns what the browser is to keep.

        Raises Unauthenticated, with a message that says why; Forbidden where the key sees nothing;
        StoreUnavailable.
        """
        if is_session_token(token):
            raise Unauthenticated("That is no API key of this server.")
        caller = self.caller(token)
        if Scope.READ not in caller.scopes:
            raise Forbidden(
                "This API key lacks the scope 'read', without which the pages show nothing.",
                scope=Scope.READ.value,
            )
        now = self._clock()
        session, session_token = new_session(self._key(token), now, life_s)
        self._store.add_session(session, now)
        return session_token

    def sign_out(self, session_token: str) -> None:
        """End a session at once, on all servers of this data folder. Raises StoreUnavailable."""
        self._store.end_session(digest(session_token))
        self._known.pop(digest(session_token), None)
        self._changes.note()

    def note_change(self) -> None:
        """A key was made or revoked: believe nothing older. Raises OSError."""
        self._changes.note()

    # -- what it leaves behind -----------------------------------------------------------------

    def note_uses(self) -> bool:
        """Tell the store when keys were last used; called now and then. Raises StoreUnavailable."""
        with self._lock:
            uses, self._uses = self._uses, {}
        if uses:
            self._store.note_key_uses(uses)
        return False


def _refusal(key: ApiKey, session: Session | None, now: datetime) -> str | None:
    if session is not None and session.expires_at <= now:
        return "signed out after a while"
    return key.refusal(now)


def has_keys(settings: Settings) -> bool:
    """Whether there are keys, asked from outside of a server. Makes no database that isn't there.

    Raises StoreUnavailable, StorageFull.
    """
    if not settings.database_url and not settings.sqlite_file.exists():
        return False
    store = Store(settings.resolved_database_url)
    try:
        store.migrate()
        return store.has_keys()
    finally:
        store.close()
