"""Where each setting has its value from: what `vllm-batch config show` tells.

Also what was meant as a setting and isn't one: a variable `VLLM_BATCH_…` of an unknown name counts
for nothing, and nothing else would say so.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_app.config import CONFIG_FILE_VARIABLE, DEFAULT_CONFIG_FILE, Settings, load_settings
from batch_app.errors import ConfigError

PREFIX = "VLLM_BATCH_"
WEBHOOK_SECRET_VARIABLE = f"{PREFIX}WEBHOOK_SECRET"
#: Variables that are no settings of a site, and who reads them.
OTHER_VARIABLES: Mapping[str, str] = {
    CONFIG_FILE_VARIABLE: "the settings file",
    "VLLM_BATCH_SERVER": "the server that commands ask, as --server",
    "VLLM_BATCH_API_KEY": "the API key that commands send, as --api-key",
    WEBHOOK_SECRET_VARIABLE: "the secret of webhooks that `submit` asks for",
    "VLLM_BATCH_CORE_START": "how vLLM's engine core is started: fork or spawn",
    "VLLM_BATCH_ENGINE": "which engine `make setup` installs",
}
#: Read by tests alone.
_OF_TESTS = frozenset({"VLLM_BATCH_CRASH_AT"})
_SECRETS = frozenset({"VLLM_BATCH_API_KEY", WEBHOOK_SECRET_VARIABLE})
_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@\s]*@")
_TOKEN = re.compile(r"\b(vbk_[0-9a-f]{12}_)\w+")
MASK = "***"


@dataclass(frozen=True, slots=True)
class Origin:
    """One setting. `value` is fit for the screen: passwords and keys are masked.

    `source`: `default`, the name of a variable, or the path of the settings file. Where the
    settings as a whole can't be used, the value is as it was written.
    """

    name: str
    value: Any
    source: str
    default: Any
    description: str


@dataclass(frozen=True, slots=True)
class Origins:
    """`problem`: why these settings can't be used, if so. `others`: the variables of
    `OTHER_VARIABLES` that are set. `unknown`: variables and what they may have been meant for."""

    settings: tuple[Origin, ...]
    config_file: Path
    has_config_file: bool
    others: tuple[Origin, ...]
    unknown: Mapping[str, str | None]
    problem: str | None = None


def origins(environment: Mapping[str, str] = os.environ) -> Origins:
    """Look at defaults, settings file and environment. Raises nothing: what is wrong is told."""
    path = Path(environment.get(CONFIG_FILE_VARIABLE, DEFAULT_CONFIG_FILE))
    in_file, problem = _read(path)
    variables = {name.upper(): name for name in environment if name.upper().startswith(PREFIX)}
    settings: Settings | None = None
    try:
        settings = load_settings()
    except ConfigError as error:
        problem = problem or error.message
    found = []
    for name, field in Settings.model_fields.items():
        variable = variables.pop(f"{PREFIX}{name.upper()}", None)
        default = _shown(field.default)
        if variable is not None:
            source, written = variable, environment[variable]
        elif name in in_file:
            source, written = str(path), in_file[name]
        else:
            source, written = "default", field.default
        value = written if settings is None else getattr(settings, name)
        found.append(Origin(name, _shown(value), source, default, field.description or ""))
    others = tuple(
        Origin(name, MASK if name in _SECRETS else _shown(environment[name]), name, None, meaning)
        for name, meaning in OTHER_VARIABLES.items()
        if variables.pop(name, None) is not None and name in environment
    )
    unknown = {name: _meant(name) for name in sorted(set(variables.values()) - _OF_TESTS)}
    return Origins(tuple(found), path, path.is_file(), others, unknown, problem)


def masked(text: str) -> str:
    """The text without the passwords of URLs and the secrets of API keys."""
    return _TOKEN.sub(rf"\1{MASK}", _PASSWORD.sub(rf"\1:{MASK}@", text))


def _shown(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return [_shown(part) for part in value]
    return masked(str(value))


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"The settings file {path} cannot be read: {error}"


def _meant(variable: str) -> str | None:
    names = [f"{PREFIX}{name.upper()}" for name in Settings.model_fields]
    close = difflib.get_close_matches(variable.upper(), [*names, *OTHER_VARIABLES], 1, 0.75)
    return close[0] if close else None
