"""Idempotency keys of uploads: what a form says, told from its bytes; and which keys are in use.

The store remembers a key once its batch is there. Until then, only this process knows of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import orjson

from batch_app.errors import KeyInUse


class FormFingerprint:
    """Tells whether two forms say the same: the same fields, in any order, and the same file.

    Takes the file piece by piece. The file's name, and how the form was put together, don't count.
    """

    def __init__(self) -> None:
        self._file = hashlib.sha256()

    def take(self, piece: bytes) -> None:
        """The next bytes of the file."""
        self._file.update(piece)

    def with_fields(self, fields: Mapping[str, str]) -> str:
        said = orjson.dumps(["form", sorted(fields.items()), self._file.hexdigest()])
        return hashlib.sha256(said).hexdigest()


class KeysInUse:
    """The keys of requests under way. Belongs to one event loop."""

    def __init__(self) -> None:
        self._keys: set[tuple[str | None, str]] = set()

    @contextmanager
    def hold(self, owner: str | None, key: str | None) -> Iterator[None]:
        """Hold this key of this owner; nothing to do where there is no key. Raises KeyInUse."""
        if key is None:
            yield
            return
        if (owner, key) in self._keys:
            raise KeyInUse(
                "A request with this Idempotency-Key is under way. Repeat yours when it has its "
                "answer: you will get the same one."
            )
        self._keys.add((owner, key))
        try:
            yield
        finally:
            self._keys.discard((owner, key))
