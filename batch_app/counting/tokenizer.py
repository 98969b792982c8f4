"""A model's own tokenizer, read from its folder. For `child.py`: it may take hundreds of MB."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from batch_app.counting.prompts import Prompt
from batch_app.counting.template import ChatTemplate

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Unusable(Exception):
    """The folder has no tokenizer that can be read here; the message says why."""


class Tokenizer(Protocol):
    """`template_for`: the chat template of a body, if the model has one."""

    def template_for(self, has_tools: bool) -> ChatTemplate | None: ...

    def count(self, prompts: Sequence[Prompt]) -> list[int]: ...


class ModelTokenizer:
    """`tokenizer.json` and the chat template beside it.

    `chat_template`: text, or a file's name, that goes before the model's own.

    Raises Unusable.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise Unusable("the library `tokenizers` is not installed") from None
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise Unusable("the model has no tokenizer.json on this machine")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise Unusable(f"its tokenizer.json can't be read: {type(error).__name__}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        try:
            self._templates = {
                name: ChatTemplate(text, special_tokens)
                for name, text in _templates(folder, config, chat_template).items()
            }
        except TemplateError as error:
            raise Unusable(f"its chat template can't be compiled: {error}") from error

    def template_for(self, has_tools: bool) -> ChatTemplate | None:
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates.get("default")

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt; all texts at once, so that all processors share them."""
        counts = [prompt.num_ids for prompt in prompts]
        for special_tokens in (False, True):
            owners, texts = [], []
            for number, prompt in enumerate(prompts):
                if bool(prompt.special_tokens) is special_tokens:
                    owners += [number] * len(prompt.texts)
                    texts += prompt.texts
            encode = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
            for owner, encoding in zip(
                owners, encode(texts, add_special_tokens=special_tokens), strict=True
            ):
                counts[owner] += len(encoding)
        return [
            count if prompt.keeps is None else min(count, prompt.keeps)
            for count, prompt in zip(counts, prompts, strict=True)
        ]


class WordTokenizer:
    """Of the simulated engine: a word of the last message is a token."""

    def __init__(self) -> None:
        self._template = ChatTemplate("{{ messages[-1].content }}", {})

    def template_for(self, has_tools: bool) -> ChatTemplate | None:
        return self._template

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        return [
            prompt.num_ids + sum(len(text.split()) for text in prompt.texts) for prompt in prompts
        ]


def chat_templates(folder: Path) -> dict[str, str]:
    """Read a model's chat templates by name, `default` among them; empty if it has none."""
    return _templates(folder, _read_json(folder / "tokenizer_config.json"), None)


def _templates(folder: Path, config: Mapping[str, Any], given: str | None) -> dict[str, str]:
    """By name; `default` is the one that counts where none is for tools."""
    if given is not None:
        path = Path(given).expanduser()
        is_file = "\n" not in given and "{" not in given and path.is_file()
        return {"default": path.read_text(encoding="utf-8") if is_file else given}
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return {"default": beside.read_text(encoding="utf-8")}
    of_processor = _read_json(folder / "chat_template.json").get("chat_template")
    found = of_processor or config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
