"""Slips of the pen: which field somebody meant who wrote one that there is not. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

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
    near = [name for name in known if _is_slip(plain, _plain(name))]
    # The first letter is seldom the wrong one.
    return min(near, key=lambda name: name[:1] != plain[:1], default=None)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _is_slip(typed: str, meant: str) -> bool:
    """Whether one letter is missing, too many or wrong, or two are exchanged."""
    if abs(len(typed) - len(meant)) > 1 or len(meant) < 4:
        return typed == meant
    same = min(len(typed), len(meant))
    start = next((at for at in range(same) if typed[at] != meant[at]), same)
    one, other = typed[start:], meant[start:]
    return (
        one[1:] == other
        or one == other[1:]
        or one[1:] == other[1:]
        or (one[1::-1] == other[:2] and one[2:] == other[2:])
    )
