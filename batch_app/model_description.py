"""What a model's small files say: configuration, chat template, and the sizes of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
from jinja2 import TemplateError

from batch_app.counting.template import ChatTemplate
from batch_app.counting.tokenizer import chat_templates
from batch_app.engine.fetch import PATTERNS
from batch_app.errors import BadRequest
from batch_app.gguf import FIX_GGUF, gguf_problem
from batch_app.parsers import Parser, reasoning_parser

SWITCHES = ("enable_thinking", "thinking")
_WEIGHTS = (".safetensors", ".bin", ".pt")


@dataclass(frozen=True)
class ModelDescription:
    """A model as its small files describe it.

    `place` is a folder or hub id. `file_sizes`: bytes by file name, weights included.
    `download_bytes`: what the worker has yet to download; 0 for a folder. `is_gated`: the hub asks
    for consent to a licence.
    """

    place: str
    config: Mapping[str, Any]
    template: str | None
    file_sizes: Mapping[str, int]
    download_bytes: int = 0
    is_gated: bool = False

    @cached_property
    def _compiled(self) -> ChatTemplate | None:
        try:
            return None if self.template is None else ChatTemplate(self.template, {})
        except TemplateError:
            return None

    @property
    def has_tools(self) -> bool:
        """Whether the chat template shows tools to the model."""
        return self._compiled is not None and "tools" in self._compiled.variables

    @property
    def switch(self) -> str | None:
        """The chat template's argument that turns reasoning on and off; None without one."""
        known = frozenset() if self._compiled is None else self._compiled.variables
        return next((name for name in SWITCHES if name in known), None)

    @cached_property
    def thinks_by_default(self) -> bool | None:
        """Whether the switch is on where a request says nothing; None if that can't be told."""
        template, switch = self._compiled, self.switch
        if template is None or switch is None:
            return None
        content = [{"type": "text", "text": "Hi"}] if template.wants_parts else "Hi"
        messages = [{"role": "user", "content": content}]
        try:
            default, on, off = (
                template.render(messages, arguments=arguments)
                for arguments in ({}, {switch: True}, {switch: False})
            )
        except Exception:  # noqa: BLE001 - a template may raise anything
            return None
        if on == off or default not in (on, off):
            return None
        return default == on

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights; of several formats, those that vLLM takes."""
        of = {
            kind: sum(size for name, size in self.file_sizes.items() if name.endswith(kind))
            for kind in _WEIGHTS
        }
        return next((num_bytes for num_bytes in of.values() if num_bytes), 0)

    @property
    def thinks(self) -> bool:
        """Whether the chat template shows that the model reasons before it answers."""
        text = self.template or ""
        marks = ("<think>", "[THINK]", "<|channel|>analysis")
        return self.switch is not None or any(mark in text for mark in marks)

    @property
    def reasoning_parser(self) -> Parser | None:
        """The parser that sets the reasoning apart; None for no reasoning, or an unknown kind."""
        return reasoning_parser(
            self.model_type,
            self.template or "",
            thinks=self.thinks,
            switch=self.switch is not None,
        )


def read_folder(folder: Path) -> ModelDescription:
    """Describe the model in a folder.

    Raises:
        BadRequest: its weights are GGUF files, or its config.json is missing or damaged.
    """
    sizes = {path.name: path.stat().st_size for path in folder.glob("*") if path.is_file()}
    check_formats(str(folder), sizes)
    return ModelDescription(str(folder), read_config(folder), read_template(folder), sizes)


def check_formats(place: str, file_names: Mapping[str, int]) -> None:
    """Raises BadRequest where the files are of a format that vLLM can't load."""
    problem = gguf_problem(place, list(file_names))
    if problem is not None:
        raise BadRequest(f"{problem}. Instead, {FIX_GGUF}.")
    if "config.json" not in file_names:
        raise BadRequest(
            f"{place} holds no model: it has no config.json. Name the folder or hub id of a whole "
            "model; an adapter needs its base model."
        )


def read_config(folder: Path, place: str | None = None) -> dict[str, Any]:
    """Read a folder's config.json. Raises BadRequest."""
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise BadRequest(f"The config.json of {place or folder} can't be read: {error}.") from error
    if not isinstance(config, dict):
        raise BadRequest(f"The config.json of {place or folder} is not a JSON object.")
    return config


def read_template(folder: Path) -> str | None:
    """Read a folder's chat template, the one for tools where there are several; None without."""
    templates = chat_templates(folder)
    return templates.get("tool_use") or templates.get("default")


def downloaded_bytes(sizes: Mapping[str, int]) -> int:
    """Sum up the files that the worker downloads from the hub."""
    wanted = (
        size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in PATTERNS)
    )
    return sum(wanted)
