"""The model registry, `models.toml`: which models may run, from where, with which arguments.

```toml
[[model]]
name = "google/gemma-3-4b-it"    # what a request says
source = "google/gemma-3-4b-it"  # a hub id, or a folder relative to this file
revision = "main"
aliases = ["gemma"]
engine = "vllm"                  # or "openai", a server (`model_server`); "ray", a cluster
                                 # (`cluster`); "sim", simulated
chat_template_kwargs = ["enable_thinking"]  # the names that requests may give
[model.engine_args]              # the engine's own argument names
max_model_len = 4096
```

What does not stand in it does not run: a request never triggers a download of its own choosing.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batch_app.cluster import RayCluster
from batch_app.errors import ConfigError, ModelNotFound
from batch_app.model_server import PATHS, ModelServer

_MODEL_HEADER = re.compile(r"\s*\[\[\s*model\s*\]\]")


class ModelEntry(BaseModel):
    """One model of the registry. `source` is absolute where the registry named a local folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    engine: str = "vllm"
    trust_remote_code: bool = False
    engine_args: dict[str, Any] = Field(default_factory=dict)
    #: The names that requests may give; `policy.ANY` among them: any.
    chat_template_kwargs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _elsewhere_is_usable(self) -> ModelEntry:
        try:
            if self.has_server:
                ModelServer.of(self.engine_args)
            elif self.engine == "ray":
                RayCluster.of(self.engine_args)
        except ConfigError as error:
            raise ValueError(f"{self.name}: {error.message}") from None
        return self

    @model_validator(mode="after")
    def _is_one_engine(self) -> ModelEntry:
        given = {name.replace("-", "_"): value for name, value in self.engine_args.items()}
        size = given.get("data_parallel_size")
        if self.engine in ("vllm", "ray") and size is not None and str(size) != "1":
            raise ValueError(
                f"{self.name}: data_parallel_size = {size} can't be used: a worker runs one "
                "engine. Start one worker for each GPU instead (CUDA_VISIBLE_DEVICES), or use "
                f'engine = "ray" with max_replicas = {size}.'
            )
        return self

    @property
    def fingerprint(self) -> str:
        """The same for entries that say the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]

    @property
    def has_server(self) -> bool:
        """A server has the model: `source` is its name there."""
        return self.engine == "openai"

    @property
    def runs_elsewhere(self) -> bool:
        """On a server or a cluster: no file of the model is needed here, and this machine says
        nothing about its speed."""
        return self.has_server or self.engine == "ray"

    @property
    def max_model_len(self) -> int | None:
        value = self.engine_args.get("max_model_len")
        return value if isinstance(value, int) else None


class _RegistryFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: list[ModelEntry] = Field(default_factory=list)


class ModelRegistry:
    """The entries by name and alias. Iterates in the file's order."""

    def __init__(self, entries: list[ModelEntry]) -> None:
        self.entries = tuple(entries)
        self._by_name: dict[str, ModelEntry] = {}
        for entry in entries:
            for name in (entry.name, *entry.aliases):
                if name in self._by_name:
                    raise ConfigError(f"The model registry names {name!r} twice.")
                self._by_name[name] = entry

    @classmethod
    def load(cls, path: Path) -> ModelRegistry:
        """Read a registry file.

        Raises:
            ConfigError: the file is missing, can't be read, isn't TOML, or has an entry that can't
                be used; the message names the line.
        """
        text = ""
        try:
            text = path.read_text(encoding="utf-8")
            parsed = _RegistryFile.model_validate(tomllib.loads(text))
        except FileNotFoundError:
            raise ConfigError(
                f"There is no model registry at {path}. Run from the project's folder, or name "
                "the registry with VLLM_BATCH_MODELS."
            ) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"The model registry {path} is not valid TOML: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The model registry {path} can't be read: {error}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            said = first["msg"].removeprefix("Value error, ")
            line = _line_of(text, first["loc"])
            place = f"{path}, line {line}" if line else str(path)
            # Without the cause, which repeats what was given: a key, where one shouldn't be.
            raise ConfigError(f"The model registry {place}: {where}: {said}") from None
        return cls([_with_absolute_paths(entry, path.parent) for entry in parsed.model])

    def get(self, name: str) -> ModelEntry:
        """The entry of this name or alias.

        Raises:
            ModelNotFound: there is none; the message lists those that are.
        """
        entry = self._by_name.get(name)
        if entry is None:
            known = ", ".join(entry.name for entry in self.entries) or "none"
            raise ModelNotFound(
                f"The model {name[:200]!r} is not in the registry. Models there: {known}.",
                param="model",
            )
        return entry

    def knows(self, name: str) -> bool:
        return name in self._by_name


def _line_of(text: str, where: Sequence[int | str]) -> int | None:
    """The line, counted from 1, of what an error speaks of: `("model", 2, "source")`. That of its
    `[[model]]` where the file doesn't show it more exactly; None where not even that is found."""
    lines = text.splitlines()
    starts = [place for place, line in enumerate(lines) if _MODEL_HEADER.match(line)]
    if len(where) < 2 or not isinstance(where[1], int) or where[1] >= len(starts):
        name = str(where[0]) if where else ""
        of_file = [n for n, line in enumerate(lines) if re.match(rf"\s*\[*\s*{name}\b", line)]
        return of_file[0] + 1 if name and name != "model" and of_file else None
    start = starts[where[1]]
    end = next((place for place in starts if place > start), len(lines))
    for name in reversed([str(part) for part in where[2:]]):
        field = re.compile(rf"\s*(\[+\s*model\s*\.\s*)?[\"']?{re.escape(name)}[\"']?\s*[=.\]]")
        for place in range(start, end):
            if field.match(lines[place]):
                return place + 1
    return start + 1


class AnyModel(ModelRegistry):
    """A registry that knows every name: for checks where there is none."""

    def __init__(self) -> None:
        super().__init__([])

    def get(self, name: str) -> ModelEntry:
        return ModelEntry(name=name, source=name)

    def knows(self, name: str) -> bool:
        return True


def _with_absolute_paths(entry: ModelEntry, base: Path) -> ModelEntry:
    if entry.has_server:
        paths = {name: entry.engine_args[name] for name in PATHS if entry.engine_args.get(name)}
        absolute = {
            name: str((base / Path(path).expanduser()).resolve()) for name, path in paths.items()
        }
        return entry.model_copy(update={"engine_args": entry.engine_args | absolute})
    folder = base / Path(entry.source).expanduser()
    if not folder.is_dir():
        return entry  # a hub id
    return entry.model_copy(update={"source": str(folder.resolve())})
