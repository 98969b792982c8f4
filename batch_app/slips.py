"""Slips of the pen: which field somebody meant who wrote one that there is not. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

#: How much of two names, by `difflib`, must be the same: a letter or two that are wrong, missing,
#: too many or exchanged.
ALIKE = 0.82
#: What others call it.
_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
    "repeat_penalty": "repetition_penalty",
}


def meant_by(key: str, allowed: Iterable[str]) -> str | None:
    """The allowed field that this one is a slip of; None where there is no such one. Remembers:
    every line of a large file may have the same one."""
    return None if len(key) > 40 else _meant_by(key, tuple(allowed))


@lru_cache(256)
def _meant_by(key: str, known: tuple[str, ...]) -> str | None:
    if _ELSEWHERE.get(key) in known:
        return _ELSEWHERE[key]
    plain = _plain(key)
    by_plain = {_plain(name): name for name in known}
    near = difflib.get_close_matches(plain, by_plain, cutoff=ALIKE)
    # The first letter is seldom the wrong one.
    best = min(near, key=lambda name: name[:1] != plain[:1], default=None)
    return None if best is None else by_plain[best]


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
