"""Changes to `models.toml` that leave the rest of it as it was, comments and all.

The text is changed, not written anew from what it says. Whether the change says what was meant is
then asked of the parser: a file that is laid out in a way this module doesn't know is refused,
never damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batch_app.errors import BadRequest, ConfigError, Conflict, ModelNotFound
from batch_app.files import atomic_writer

MAX_NAME_CHARS = 200
#: Names stand in paths of URLs and in the names of files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._:@+-]*)*")
_ARGUMENT = re.compile(r"[a-z][a-z0-9_]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_-]+)[^=]*\]")
_MODEL_HEADER = re.compile(r"\s*\[\[\s*model\s*\]\]")
#: Engine arguments that the registry has a field of its own for, or that come from elsewhere.
_OWN_FIELDS = {
    "model": "the source of the model",
    "served_model_name": "its name",
    "revision": "--revision",
    "trust_remote_code": "--trust-remote-code",
}
NEW_FILE = "# The models this server may run. docs/models.md explains every field.\n"


def checked_name(name: str) -> str:
    """A name that a model may have. Raises BadRequest."""
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise BadRequest(
            f"{name[:MAX_NAME_CHARS]!r} can't be a model's name. A name has up to "
            f"{MAX_NAME_CHARS} letters, digits and any of . _ : @ + - in parts joined by /, and "
            "begins with a letter or digit.",
            param="name",
        )
    return name


def engine_argument(text: str) -> tuple[str, Any]:
    """`K=V` as vLLM's name and a value. V is JSON, else a string. Raises BadRequest."""
    key, joint, written = text.partition("=")
    name = key.strip().removeprefix("--").replace("-", "_")
    if not joint or not _ARGUMENT.fullmatch(name):
        raise BadRequest(
            f"{text[:MAX_NAME_CHARS]!r} is no engine argument. Say NAME=VALUE by vLLM's own name, "
            "as max_model_len=8192.",
            param="engine_arg",
        )
    if name in _OWN_FIELDS:
        raise BadRequest(
            f"The engine argument {name!r} is given by {_OWN_FIELDS[name]}.", param="engine_arg"
        )
    value: Any = written.strip()
    with contextlib.suppress(ValueError):
        value = json.loads(value)
    if value is None:
        raise BadRequest(
            f"{name}: null says nothing in TOML. Leave the argument out.", param="engine_arg"
        )
    return name, value


class RegistryFile:
    """One `models.toml`, to be changed. Each change is there whole, or not at all."""

    def __init__(self, path: Path) -> None:
        """The file need not be there yet: `add` makes it."""
        # The file itself, where a link names it.
        self.path = path.resolve()

    def check_names(self, names: Sequence[str]) -> None:
        """Check that a new entry may have these names: its name and its aliases.

        Raises:
            BadRequest: one can't be a name.
            Conflict: one is taken.
            ConfigError: the file can't be read.
        """
        self._check_names(names, _parsed(self._read(), self.path))

    def _check_names(self, names: Sequence[str], before: Mapping[str, Any]) -> None:
        for name in names:
            checked_name(name)
        if len(set(names)) < len(names):
            raise BadRequest("A model's name and aliases must differ.", param="alias")
        for known in before.get("model", ()):
            taken = {known.get("name"), *known.get("aliases", ())} & set(names)
            if taken:
                raise Conflict(
                    f"{taken.pop()!r} is in {self.path} already: it names the model "
                    f"{known.get('name')!r}. Choose another name, or remove that one first: "
                    f"vllm-batch models remove {known.get('name')}",
                    code="model_exists",
                )

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry, whose fields are those of `ModelEntry`.

        Raises:
            BadRequest: its name, or an alias, can't be one.
            Conflict: that name, or an alias, is taken.
            ConfigError: the file can't be read, written, or is laid out in a way that isn't known.
        """
        text = self._read()
        before = _parsed(text, self.path)
        self._check_names([entry["name"], *entry.get("aliases", ())], before)
        joint = "" if not text or text.endswith("\n\n") else "\n" if text.endswith("\n") else "\n\n"
        wanted = {**before, "model": [*before.get("model", ()), dict(entry)]}
        self._write(text, (text or f"{NEW_FILE}\n") + joint + entry_text(entry), wanted)

    def remove(self, name: str) -> dict[str, Any]:
        """Take out the entry of this name or alias, with the comment right above it.

        Returns what it said.

        Raises:
            ModelNotFound: there is none.
            ConfigError: as `add`.
        """
        text = self._read()
        before = _parsed(text, self.path)
        entries: list[dict[str, Any]] = before.get("model", [])
        numbers = [
            number
            for number, entry in enumerate(entries)
            if name == entry.get("name") or name in entry.get("aliases", ())
        ]
        if not numbers:
            known = ", ".join(str(entry.get("name")) for entry in entries) or "none"
            raise ModelNotFound(
                f"The model {name[:MAX_NAME_CHARS]!r} is not in {self.path}. "
                f"Models there: {known}.",
                param="model",
            )
        number = numbers[0]
        left = [entry for place, entry in enumerate(entries) if place != number]
        wanted = {key: value for key, value in before.items() if key != "model"}
        if left:
            wanted["model"] = left
        self._write(text, _without(text, number), wanted)
        return entries[number]

    def _read(self) -> str:
        try:
            with self.path.open(encoding="utf-8", newline="") as file:  # line ends as they are
                return file.read()
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The model registry {self.path} can't be read: {error}") from error

    def _write(self, old: str, new: str, wanted: Mapping[str, Any]) -> None:
        try:
            as_meant = tomllib.loads(new) == wanted
        except tomllib.TOMLDecodeError:
            as_meant = False
        if not as_meant:
            raise ConfigError(
                f"{self.path} is laid out in a way that this command can't change safely. Nothing "
                "was changed; edit it by hand (docs/models.md)."
            )
        if self._read() != old:
            raise Conflict(f"{self.path} was changed meanwhile. Nothing was done; try again.")
        try:
            mode = stat.S_IMODE(self.path.stat().st_mode) if self.path.exists() else None
            with atomic_writer(self.path) as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.write(new.encode())
        except OSError as error:
            raise ConfigError(
                f"The model registry {self.path} can't be written: {error}"
            ) from error


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The model registry {path} is not valid TOML: {error}") from error


def _without(text: str, number: int) -> str:
    """The text without the numbered `[[model]]`, its tables, and the comment right above it."""
    lines = text.splitlines(keepends=True)
    starts = [place for place, line in enumerate(lines) if _MODEL_HEADER.match(line)]
    if number >= len(starts):
        return text
    end = start = starts[number]
    end += 1
    while end < len(lines):
        header = _HEADER.match(lines[end])
        if header and (header[1] != "model" or _MODEL_HEADER.match(lines[end])):
            break
        end += 1
    start = _above(lines, start)
    if end < len(lines):
        end = _above(lines, end)  # that comment is the next one's
    left = lines[:start] + lines[end:]
    if end >= len(lines):
        while left and not left[-1].strip():
            left.pop()
    return "".join(left)


def _above(lines: Sequence[str], place: int) -> int:
    """Where the comment begins that stands right above this line. One at the very top of the file
    is the file's own."""
    first = place
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return place if first == 0 else first


def entry_text(entry: Mapping[str, Any]) -> str:
    """An entry as a registry holds it: the fields of `ModelEntry`, without None."""
    rest = {key: value for key, value in entry.items() if key != "engine_args"}
    lines = ["[[model]]", *(f"{key} = {_toml(value)}" for key, value in rest.items())]
    arguments = entry.get("engine_args")
    if arguments:
        lines.append("[model.engine_args]")
        lines += [f"{_key(key)} = {_toml(value)}" for key, value in arguments.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML writes it. Raises BadRequest where it has none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_key(name)} = {_toml(part)}" for name, part in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    raise BadRequest("null says nothing in TOML. Leave it out.", param="engine_arg")


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _toml(name)
