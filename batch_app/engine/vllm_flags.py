"""The flags of vLLM's `run-batch`, read from its source: importing vLLM takes many seconds.

What they mean is left to vLLM's own parser, once the engine process has it. Known here is only what
a command line can't be read without: which flags there are, and how many words each one takes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Where the releases from 0.24 on keep them. Of each line, the first file that is there.
_ENGINE = ("engine/arg_utils.py",)
_FRONTEND = (
    "entrypoints/common/cli_args.py",
    "entrypoints/launchers/cli_args.py",
    "entrypoints/openai/cli_args.py",
)
_RUNNER = ("entrypoints/launchers/run_batch.py", "entrypoints/openai/run_batch.py")


class Takes(Enum):
    """How many words follow a flag."""

    NONE = "none"
    ONE = "one"
    SOME = "some"


@dataclass(frozen=True, slots=True)
class Flag:
    """`name` is the engine argument's; `negated`: the flag is its `--no-…`."""

    name: str
    takes: Takes
    negated: bool = False


@cache
def known_flags() -> Mapping[str, Flag]:
    """By option (`--max-model-len`, `-tp`), long ones with dashes.

    Empty where there is no vLLM, or one whose source is laid out in another way.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    return flags_in(Path(spec.submodule_search_locations[0]))


def flags_in(root: Path) -> Mapping[str, Flag]:
    """As `known_flags`, of the vLLM whose package is this folder."""
    try:
        engine, frontend, runner = (_parse(root, paths) for paths in (_ENGINE, _FRONTEND, _RUNNER))
        fields = _fields(engine, "EngineArgs") | _fields(engine, "AsyncEngineArgs")
        own = _fields(frontend, "BaseFrontendArgs") | _fields(runner, "BatchFrontendArgs")
    except (OSError, SyntaxError, KeyError):
        return {}
    flags: dict[str, Flag] = {}
    for call in _calls(engine):
        _add(flags, call, fields)
    for name, takes in own.items():
        _add_named(flags, ["--" + name.replace("_", "-")], name, takes)
    return flags


def _parse(root: Path, paths: tuple[str, ...]) -> ast.Module:
    path = next((root / path for path in paths if (root / path).is_file()), root / paths[0])
    return ast.parse(path.read_text(encoding="utf-8"))


def _fields(module: ast.Module, class_name: str) -> dict[str, Takes]:
    """The fields of a dataclass. Raises KeyError where there is no such class."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                field.target.id: _taken_by(ast.unparse(field.annotation))
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    raise KeyError(class_name)


def _taken_by(annotation: str) -> Takes:
    """What vLLM makes of a field's type: a bool is a switch, a list takes several words."""
    if annotation in ("bool", "bool | None"):
        return Takes.NONE
    if "dict[" in annotation:
        return Takes.ONE
    return Takes.SOME if "list[" in annotation or "set[" in annotation else Takes.ONE


def _calls(module: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            yield node


def _add(flags: dict[str, Flag], call: ast.Call, fields: Mapping[str, Takes]) -> None:
    options = [
        word.value
        for word in call.args
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    ]
    long = next((option for option in options if option.startswith("--")), None)
    if long is None:
        return
    name = long.removeprefix("--").replace("-", "_")
    # `**kwargs["field"]` is made of the field's type; without it, the call itself says all.
    made_of_field = any(keyword.arg is None for keyword in call.keywords)
    takes = fields.get(name, Takes.ONE) if made_of_field else Takes.ONE
    for keyword in call.keywords:
        if keyword.arg == "action":
            action = ast.unparse(keyword.value)
            if "store_true" in action or "BooleanOptional" in action:
                takes = Takes.NONE
    _add_named(flags, options, name, takes)


def _add_named(flags: dict[str, Flag], options: list[str], name: str, takes: Takes) -> None:
    for option in options:
        flags[option] = Flag(name, takes)
        if takes is Takes.NONE and option.startswith("--"):
            # Also where vLLM has none: off is what such a flag is when it isn't given.
            flags["--no-" + option.removeprefix("--")] = Flag(name, takes, negated=True)
