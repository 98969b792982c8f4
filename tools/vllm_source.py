"""vLLM's source, read without importing it: where a name is defined, and with which signature."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


class Definition(NamedTuple):
    """`node`: the statement that defines a name; `module`: its place. A module defines itself."""

    module: str
    node: ast.AST


class Source:
    """A folder that holds the package `vllm`: an unpacked wheel, or site-packages."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "vllm" / "__init__.py").is_file():
            raise FileNotFoundError(f"no vllm/__init__.py in {folder}")
        self.folder = folder
        self.module = cache(self._module)

    def _path(self, module: str) -> Path | None:
        stem = self.folder.joinpath(*module.split("."))
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            if path.is_file():
                return path
        return None

    def _module(self, module: str) -> ast.Module | None:
        """The parsed module, or None if there is none of this name."""
        path = self._path(module)
        return None if path is None else ast.parse(path.read_text(encoding="utf-8"))

    def find(self, module: str, name: str) -> Definition | None:
        """Where `name` of `module` is defined, through any number of re-exports."""
        return self._find(module, name, frozenset())

    def _find(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> Definition | None:
        tree = self.module(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        imported: Definition | None = None
        for statement in _top_level(tree.body):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        origin = self._origin(module, statement)
                        imported = self._find(origin, alias.name, seen) or imported
            elif name in _defined(statement):
                return Definition(module, statement)
        if imported is not None:
            return imported
        submodule = self.module(f"{module}.{name}")
        return None if submodule is None else Definition(f"{module}.{name}", submodule)

    def _origin(self, module: str, statement: ast.ImportFrom) -> str:
        if not statement.level:
            return statement.module or ""
        package = module.split(".")
        path = self._path(module)
        is_package = path is not None and path.name == "__init__.py"
        drop = statement.level - is_package
        package = package[: len(package) - drop] if drop else package
        return ".".join([*package, *(statement.module or "").split(".")]).rstrip(".")

    def member(self, owner: Definition, name: str) -> ast.AST | None:
        """What defines the attribute `name` of a class or a module, in its bases too."""
        if isinstance(owner.node, ast.Module):
            found = self.find(owner.module, name)
            return None if found is None else found.node
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for statement in owner.node.body:
            if name in _defined(statement):
                return statement
        for node in ast.walk(owner.node):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr) == ("self", name)
            ):
                return node
        for base in self.bases(owner):
            found_in_base = self.member(base, name)
            if found_in_base is not None:
                return found_in_base
        return None

    def bases(self, owner: Definition) -> Iterator[Definition]:
        """The base classes that vLLM itself defines."""
        assert isinstance(owner.node, ast.ClassDef)
        for base in owner.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                found = self.find(owner.module, plain.id)
                if found is not None and isinstance(found.node, ast.ClassDef):
                    yield found

    def signature(self, found: Definition) -> ast.arguments | None:
        """What a call of a function or a class takes, without `self` or `cls`.

        None if the source does not say: a class with neither `__init__` nor fields.
        """
        node: ast.AST | None = found.node
        if isinstance(node, ast.ClassDef):
            struct = any(
                ast.unparse(decorator).split("(")[0].split(".")[-1] in ("dataclass", "config")
                for decorator in node.decorator_list
            )
            node = None if struct else self.member(found, "__init__")
            if node is None:
                return _of_fields(found.node) if _is_struct(found.node) or struct else None
            return _without_self(node) if isinstance(node, Function) else None
        if isinstance(node, Function):
            return node.args
        return None

    def files(self, package: str) -> Iterator[Path]:
        yield from sorted(self.folder.joinpath(*package.split(".")).rglob("*.py"))


def method_signature(node: ast.AST) -> ast.arguments | None:
    """What a call of a method takes: without `self` or `cls`."""
    return _without_self(node) if isinstance(node, Function) else None


def is_property(node: ast.AST) -> bool:
    return isinstance(node, Function) and any(
        ast.unparse(decorator).endswith("property") for decorator in node.decorator_list
    )


def why_not_callable(
    arguments: ast.arguments, positional: int, keywords: tuple[str, ...]
) -> str | None:
    """Why a function with these parameters cannot be called like this; None if it can."""
    in_order = [*arguments.posonlyargs, *arguments.args]
    if positional > len(in_order) and arguments.vararg is None:
        return f"takes {len(in_order)} positional arguments, we pass {positional}"
    by_keyword = {parameter.arg for parameter in (*arguments.args, *arguments.kwonlyargs)}
    filled = {parameter.arg for parameter in in_order[:positional]}
    for keyword in keywords:
        if keyword in filled:
            return f"gets {keyword} twice"
        if keyword not in by_keyword and arguments.kwarg is None:
            return f"has no parameter {keyword}"
    required = in_order[: len(in_order) - len(arguments.defaults)]
    required += [
        parameter
        for parameter, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if default is None
    ]
    missing = [
        parameter.arg for parameter in required if parameter.arg not in filled | set(keywords)
    ]
    return f"requires {', '.join(missing)}" if missing else None


def _without_self(function: Function) -> ast.arguments:
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
    arguments = function.args
    if static or not arguments.args:
        return arguments
    return ast.arguments(
        posonlyargs=arguments.posonlyargs,
        args=arguments.args[1:],
        vararg=arguments.vararg,
        kwonlyargs=arguments.kwonlyargs,
        kw_defaults=arguments.kw_defaults,
        kwarg=arguments.kwarg,
        defaults=arguments.defaults,
    )


def _is_struct(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(
        ast.unparse(base).split(".")[-1] in ("Struct", "NamedTuple") for base in node.bases
    )


def _of_fields(node: ast.AST) -> ast.arguments:
    """The signature that a dataclass or struct gets from its fields."""
    assert isinstance(node, ast.ClassDef)
    fields = [
        statement
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]
    return ast.arguments(
        posonlyargs=[],
        args=[],
        vararg=None,
        kwonlyargs=[ast.arg(ast.unparse(field.target)) for field in fields],
        kw_defaults=[field.value for field in fields],
        kwarg=None,
        defaults=[],
    )


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run at import, including those under `if` and `try`."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _top_level(statement.body)
            yield from _top_level(statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _top_level(statement.body)
            for handler in statement.handlers:
                yield from _top_level(handler.body)
        else:
            yield statement


def _defined(statement: ast.stmt) -> set[str]:
    """The names that this statement defines."""
    if isinstance(statement, Function | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.AnnAssign):
        return {statement.target.id} if isinstance(statement.target, ast.Name) else set()
    if isinstance(statement, ast.Assign):
        return {
            node.id
            for target in statement.targets
            for node in ast.walk(target)
            if isinstance(node, ast.Name)
        }
    return set()
