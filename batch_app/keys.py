"""API keys: what they look like, what they allow, and who a request's caller is. Pure.

A key is `vbk_` + 12 hexadecimal digits, by which it is looked up, + `_` + 192 random bits + the
CRC-32 of all before it, in hexadecimal. The checksum tells a mistyped key, or something else sent
as one, from a key without a look at the store, and lets scanners of leaked secrets find ours. The
store keeps the SHA-256 of the whole: with so many random bits nothing slower is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

PREFIX = "vbk"
_TOKEN = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_[0-9a-f]{{56}}")
_SESSION_TOKEN = re.compile(r"vbs_[0-9a-f]{64}")
_KEY_ID = re.compile(r"key_[0-9a-f]{12}")
_CHECKSUM_DIGITS = 8


class Scope(StrEnum):
    """What a key may do. `ADMIN` widens the others to what belongs to everybody."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the store knows it, which isn't enough to use it. `digest` is SHA-256 in hex.

    What is made with it belongs to `owner`: keys of one owner see the same.
    """

    id: str
    name: str
    owner: str
    digest: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def refusal(self, now: datetime) -> str | None:
        """Why it opens nothing any more; None while it does."""
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and self.expires_at <= now:
            return "expired"
        return None

    @property
    def caller(self) -> Caller:
        return Caller(self.owner, Scope.ADMIN in self.scopes, self.id, self.scopes)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. What they make belongs to `owner`; unless `sees_all`, they see only that."""

    owner: str | None
    sees_all: bool
    key_id: str | None = None
    scopes: frozenset[Scope] = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Session:
    """A sign-in to the dashboard. It opens what its key opens, as long as both are good."""

    digest: str
    key_id: str
    expires_at: datetime


#: The program itself, and whoever asks where there are no keys.
EVERYBODY = Caller(owner=None, sees_all=True)


def new_key(
    name: str,
    scopes: Iterable[Scope],
    now: datetime,
    *,
    owner: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """A key, and the secret text of it, which can't be had again. Without `owner`: one of its own.

    Raises ValueError where the scopes allow nothing.
    """
    allowed = frozenset(scopes)
    if not allowed & {Scope.READ, Scope.WRITE}:
        raise ValueError("A key needs the scope read or write.")
    number = secrets.token_hex(6)
    start = f"{PREFIX}_{number}_{secrets.token_hex(24)}"
    token = start + checksum(start)
    key_id = f"key_{number}"
    key = ApiKey(key_id, name, owner or key_id, digest(token), allowed, now, expires_at=expires_at)
    return key, token


def key_id_of(token: str) -> str | None:
    """The id of the key that this text would be; None where it can't be one."""
    match = _TOKEN.fullmatch(token)
    if match is None or checksum(token[:-_CHECKSUM_DIGITS]) != token[-_CHECKSUM_DIGITS:]:
        return None
    return f"key_{match[1]}"


def is_key_id(text: str) -> bool:
    return _KEY_ID.fullmatch(text) is not None


def is_token_of(token: str, key: ApiKey) -> bool:
    """Whether this text is that key. Takes the same time wherever they differ."""
    return hmac.compare_digest(digest(token), key.digest)


def new_session(key: ApiKey, now: datetime, life_s: float) -> tuple[Session, str]:
    """A sign-in with this key, and the random text that the browser keeps in place of the key."""
    token = f"vbs_{secrets.token_hex(32)}"
    expires_at = now + timedelta(seconds=life_s)
    return Session(digest(token), key.id, expires_at), token


def is_session_token(text: str) -> bool:
    return _SESSION_TOKEN.fullmatch(text) is not None


def form_token(session_token: str) -> str:
    """What the pages of a session send along with a change: no other site can know it."""
    return hmac.new(session_token.encode(), b"form", hashlib.sha256).hexdigest()


def is_form_token(text: str, session_token: str) -> bool:
    return hmac.compare_digest(text.encode(), form_token(session_token).encode())


def checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):0{_CHECKSUM_DIGITS}x}"


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
