"""The server that has a model, where the engine is `openai`: what the registry says of it.

```toml
[[model]]
name = "qwen3-4b"                # what requests call it
engine = "openai"
source = "Qwen/Qwen3-4B"         # what the server calls it
[model.engine_args]
base_url = "http://127.0.0.1:8000/v1"
api_key_env = "INFERENCE_API_KEY"
```

A key is named here, by the variable or the file that holds it, and never written down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from batch_app.errors import ConfigError

MIB = 1 << 20
#: Of `engine_args`, those that name a file, relative to the registry's folder.
PATHS = ("api_key_file", "ca_file")
#: What must not be shown to those who may only use the model.
PRIVATE = ("base_url", "api_key_env", *PATHS)
#: The program's own part of a request.
_OURS = frozenset({"model", "stream", "background"})
#: Variables with such names are kept from engine processes (`engine.process`).
_KEY_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*_(KEY|TOKEN|SECRET|PASSWORD)")
_MAX_KEY_CHARS = 8192


class ModelServer(BaseModel):
    """The `engine_args` of such a model. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    base_url: str
    api_key_env: str | None = None
    api_key_file: Path | None = None
    #: Certificates (PEM) that are trusted besides the usual ones.
    ca_file: Path | None = None
    #: Requests that the server has at a time: it begins low, and finds its place between these.
    max_concurrency: int = Field(256, ge=1, le=4096)
    min_concurrency: int = Field(1, ge=1)
    #: For a request, from its first byte to its answer's last.
    timeout_s: float = Field(600.0, gt=0)
    connect_timeout_s: float = Field(10.0, gt=0)
    #: Further attempts of a request that fails although the server works.
    max_retries: int = Field(5, ge=0)
    #: Before the second attempt; doubled each time, up to `max_backoff_s`.
    backoff_s: float = Field(0.5, gt=0)
    max_backoff_s: float = Field(30.0, gt=0)
    #: How long a server may refuse everything before the batch pauses.
    patience_s: float = Field(120.0, gt=0)
    max_response_bytes: int = Field(64 * MIB, gt=0, le=1024 * MIB - MIB)
    #: Whether a connection may have several requests. Without, an answer can't be another one's.
    reuse_connections: bool = True
    #: Fields that are set in every request: a priority, for example.
    extra_body: dict[str, Any] = Field(default_factory=dict)
    #: A folder or hub id whose tokenizer, if it is here, counts the prompts for estimates.
    tokenizer: str | None = None
    #: Tokens; what the server says, unless it is given.
    max_model_len: int | None = Field(None, gt=0)

    @classmethod
    def of(cls, engine_args: Mapping[str, Any]) -> ModelServer:
        """Raises ConfigError; the message repeats no value, which might be secret."""
        try:
            return cls.model_validate(dict(engine_args))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            if where == "api_key":
                said = "a key doesn't belong here: name the variable or the file that has it, "
                said += "with api_key_env or api_key_file"
            raise ConfigError(f"engine_args{'.' if where else ''}{where}: {said}") from None

    @field_validator("base_url")
    @classmethod
    def _is_plain(cls, text: str) -> str:
        try:
            url = urlsplit(text)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable or not text.isprintable() or " " in text:
            raise ValueError("it looks like http://127.0.0.1:8000/v1")
        if url.username is not None or url.query or url.fragment:
            raise ValueError("it has no user, password, query or fragment")
        return text.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_kept_back(cls, name: str | None) -> str | None:
        if name is not None and not _KEY_NAME.fullmatch(name):
            raise ValueError(
                "the name of the variable must end in _KEY, _TOKEN, _SECRET or _PASSWORD: "
                "such variables are kept from engine processes"
            )
        return name

    @field_validator("extra_body")
    @classmethod
    def _is_not_ours(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OURS & set(fields)):
            raise ValueError(f"{taken[0]!r} can't be set")
        return fields

    @model_validator(mode="after")
    def _fits_together(self) -> ModelServer:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("there can be only one of api_key_env and api_key_file")
        if self.min_concurrency > self.max_concurrency:
            raise ValueError("min_concurrency is larger than max_concurrency")
        return self

    def api_key(self, environment: Mapping[str, str]) -> str:
        """The key, empty where the server asks for none.

        Raises ConfigError where the variable or the file has none; the message doesn't repeat it.
        """
        if self.api_key_env is not None:
            key, where = environment.get(self.api_key_env, ""), f"the variable {self.api_key_env}"
        elif self.api_key_file is not None:
            where = f"the file {self.api_key_file.name} (api_key_file)"
            try:
                key = self.api_key_file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "not text"
                raise ConfigError(
                    f"{where[0].upper()}{where[1:]} can't be read: {reason}."
                ) from None
        else:
            return ""
        key = key.strip()
        if not key:
            raise ConfigError(f"There is no API key in {where}, where the worker runs.")
        if len(key) > _MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise ConfigError(f"What is in {where} can't be an API key.")
        return key
