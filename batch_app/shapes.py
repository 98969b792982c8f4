"""Shapes: what one value of a request's body may look like, as small checks that combine.

A `Check` takes a value, the name to use for it in an error (`messages[0].content`), and the limits;
it returns nothing, or raises LineProblem. Values come from a strict JSON parser, so that numbers
are finite. The checks never look into text beyond its length, and never repeat it in an error.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from batch_app.config import Settings
from batch_app.slips import meant_by

_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class LineProblem(Exception):
    """Why a line can't run; becomes a `core.LineError` where the line's number is known."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How much of what a body may ask for; the settings of the same names say more.

    `media_domains`: hosts that images may be loaded from; none: `data:` URLs only.
    """

    max_n: int = 128
    max_logprobs: int = 20
    max_output_tokens: int = 1 << 20
    max_inputs: int = 2048
    max_messages: int = 4096
    max_stop: int = 16
    max_stop_chars: int = 256
    max_tools: int = 128
    max_schema_bytes: int = 64 << 10
    max_schema_depth: int = 32
    max_regex_chars: int = 4096
    max_media_bytes: int = 8 << 20
    media_domains: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: Settings) -> BodyLimits:
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {"media_domains": frozenset(settings.media_domains)})


Check = Callable[[Any, str, BodyLimits], None]


def kind(value: Any) -> str:
    """What sort of JSON value this is, for a sentence."""
    return _KINDS.get(type(value), type(value).__name__)


def problem(name: str, message: str) -> LineProblem:
    """The error of the field `name` of the body."""
    return LineProblem("invalid_request", message, f"body.{name}")


def wrong_type(name: str, wanted: str, value: Any) -> LineProblem:
    return problem(name, f'"{name}" must be {wanted}, not {kind(value)}.')


def short(name: str) -> str:
    """A field's name as an error repeats it: it is the sender's, and may be long."""
    return name if len(name) <= 64 else name[:61] + "..."


# -- scalars -----------------------------------------------------------------------------------


def number(value: Any, name: str, limits: BodyLimits) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(name, "a number", value)


def integer(value: Any, name: str, limits: BodyLimits) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    if not -(2**63) <= value < 2**63:
        raise wrong_type(name, "an integer of at most 64 bits", value)


def boolean(value: Any, name: str, limits: BodyLimits) -> None:
    if not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)


def text(value: Any, name: str, limits: BodyLimits) -> None:
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)


def scalar(value: Any, name: str, limits: BodyLimits) -> None:
    if not isinstance(value, (str, int, float)):
        raise wrong_type(name, "a string, a number, true or false", value)


def at_most(setting: str, least: int | None = None) -> Check:
    """An integer that a setting bounds."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        integer(value, name, limits)
        if least is not None and value < least:
            raise problem(name, f'"{name}" must be at least {least}.')
        most: int = getattr(limits, setting)
        if value > most:
            raise problem(name, f'"{name}" must be at most {most} ({setting}).')

    return check


def between(least: int, most: int) -> Check:
    def check(value: Any, name: str, limits: BodyLimits) -> None:
        integer(value, name, limits)
        if not least <= value <= most:
            raise problem(name, f'"{name}" must be from {least} to {most}.')

    return check


def text_up_to(max_chars: int) -> Check:
    def check(value: Any, name: str, limits: BodyLimits) -> None:
        text(value, name, limits)
        if len(value) > max_chars:
            raise problem(name, f'"{name}" must have at most {max_chars} characters.')

    return check


def one_of(*choices: Any) -> Check:
    allowed = [(type(choice), choice) for choice in choices]
    words = " or ".join(
        {True: "true", False: "false"}[choice] if isinstance(choice, bool) else f'"{choice}"'
        for choice in choices
    )

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if (type(value), value) not in allowed:
            raise problem(name, f'"{name}" must be {words}, or be left out.')

    return check


# -- composites --------------------------------------------------------------------------------


def fields(
    value: Mapping[str, Any],
    name: str,
    limits: BodyLimits,
    allowed: Mapping[str, Check],
    refused: Mapping[str, str] | None = None,
) -> None:
    """Each field of the object `value` that isn't null by its check; any other is refused.

    `name` is "" for the body itself. `refused`: the reason why, by field.
    """
    for key, item in value.items():
        if item is None and (key in allowed or (refused and key in refused)):
            continue
        at = f"{name}.{key}" if name else key
        check = allowed.get(key)
        if check is None:
            why = (refused or {}).get(key, "It isn't a field that batches may use here.")
            meant = None if refused and key in refused else meant_by(key, allowed)
            then = "Leave it out." if meant is None else f'Perhaps "{meant}" is meant.'
            raise problem(short(at), f'"{short(at)}" is refused. {why} {then}')
        check(item, at, limits)


def record(required: Sequence[str] = (), /, **allowed: Check) -> Check:
    """An object of these fields and no others."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        fields(value, name, limits, allowed)
        for key in required:
            if value.get(key) is None:
                raise problem(f"{name}.{key}", f'"{name}" needs "{key}".')

    return check


def variants(**shapes: Check) -> Check:
    """An object whose `type` says which of these it is."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        which = value.get("type")
        shape = shapes.get(which) if isinstance(which, str) else None
        if shape is None:
            known = ", ".join(f'"{key}"' for key in shapes)
            raise problem(f"{name}.type", f'The "type" of "{name}" must be one of: {known}.')
        shape(value, name, limits)

    return check


def array(check_item: Check, *, setting: str = "", most: int = 0, least: int = 0) -> Check:
    """A list of such items; how many, a setting says or `most` (0: any number)."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if not isinstance(value, list):
            raise wrong_type(name, "a list", value)
        bound: int = getattr(limits, setting) if setting else most
        if bound and len(value) > bound:
            why = f" ({setting})" if setting else ""
            raise problem(name, f'"{name}" must have at most {bound} entries{why}.')
        if len(value) < least:
            raise problem(name, f'"{name}" must be a list of at least {least}.')
        for position, item in enumerate(value):
            check_item(item, f"{name}[{position}]", limits)

    return check


def text_or(check_list: Check) -> Check:
    """A string, or a list that this check takes."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if isinstance(value, list):
            check_list(value, name, limits)
        elif not isinstance(value, str):
            raise wrong_type(name, "a string or a list", value)

    return check


def string_or(other: Check) -> Check:
    """A string, or what this check takes."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if not isinstance(value, str):
            other(value, name, limits)

    return check


def mapping(check_item: Check, most: int) -> Check:
    """An object with any names, and such values."""

    def check(value: Any, name: str, limits: BodyLimits) -> None:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        if len(value) > most:
            raise problem(name, f'"{name}" must have at most {most} entries.')
        for key, item in value.items():
            check_item(item, f"{name}.{short(key)}", limits)

    return check


def empty(value: Any, name: str, limits: BodyLimits) -> None:
    """Fields of an answer that come back empty when it is sent again as part of a prompt."""
    if value:
        raise problem(name, f'"{name}" must be empty, or be left out.')


# -- inputs, stop strings ----------------------------------------------------------------------


def texts(value: Any, name: str, limits: BodyLimits) -> None:
    """A prompt, or a list of prompts. Token ids aren't taken: see docs/request_policy.md."""
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list of strings", value)
    if len(value) > limits.max_inputs:
        raise problem(name, f'"{name}" must have at most {limits.max_inputs} entries (max_inputs).')
    for position, item in enumerate(value):
        if not isinstance(item, str):
            hint = " Token ids are not taken: send the text."
            wanted = "a string" + ("" if isinstance(item, dict) else f", not {kind(item)}")
            raise problem(f"{name}[{position}]", f'"{name}[{position}]" must be {wanted}.{hint}')


def stop_strings(value: Any, name: str, limits: BodyLimits) -> None:
    if not isinstance(value, str):
        array(_stop_string, setting="max_stop")(value, name, limits)
    else:
        _stop_string(value, name, limits)


def _stop_string(value: Any, name: str, limits: BodyLimits) -> None:
    text(value, name, limits)
    if len(value) > limits.max_stop_chars:
        raise problem(
            name, f'"{name}" must have at most {limits.max_stop_chars} characters (max_stop_chars).'
        )


# -- media -------------------------------------------------------------------------------------


def image(value: Any, name: str, limits: BodyLimits) -> None:
    """The URL of an image: `data:`, or https from a host that the operator named."""
    text(value, name, limits)
    if value[:11].lower() == "data:image/":
        if len(value) > limits.max_media_bytes:
            raise problem(
                name,
                f'"{name}" must have at most {limits.max_media_bytes} bytes (max_media_bytes).',
            )
        return
    if not limits.media_domains:
        raise problem(
            name,
            f'"{name}" must be a "data:image/...;base64," URL: this server loads nothing from '
            "elsewhere (media_domains).",
        )
    try:
        url = urlsplit(value)
        host, port = url.hostname or "", url.port
    except ValueError:
        raise problem(name, f'"{name}" is not a URL.') from None
    # Parsers differ on these: what we take for the host, the loader might not.
    odd = any(char <= " " or char in "\\\x7f" for char in value) or not value.isascii()
    if odd or url.scheme not in ("http", "https") or "@" in url.netloc or port is not None:
        raise problem(
            name, f'"{name}" must be a plain http or https URL, without user, port or blanks.'
        )
    if host not in limits.media_domains or is_address(host):
        raise problem(
            name, f'"{name}" is on a host that this server does not load from (media_domains).'
        )


def image_or_url(value: Any, name: str, limits: BodyLimits) -> None:
    """vLLM takes the URL itself in place of the object around it."""
    if isinstance(value, str):
        image(value, name, limits)
    else:
        record(("url",), url=image, detail=text_up_to(16))(value, name, limits)


def is_address(host: str) -> bool:
    """Whether it is an IP address, in any spelling that some resolver takes for one."""
    last = host.rsplit(".", 1)[-1]
    if last.isdecimal() or last[:2].lower() == "0x":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
