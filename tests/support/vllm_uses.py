"""Find what our code uses of vLLM, and what of that `vllm_symbols` does not list.

Types are followed as far as the source says them: imports from vLLM, what is assigned from them,
what calls return, the items of what is iterated, and the variables named below, which hold vLLM's
objects. What starts elsewhere is not seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from batch_app.engine.vllm_symbols import (
    ENVIRONMENT,
    ENVIRONMENT_OF_SOME,
    SYMBOLS,
    Kind,
    Symbol,
    Use,
    parse_use,
)

#: The names of the symbols that a value may be, or be an instance of.
Classes: TypeAlias = frozenset[str]

#: Variables that hold an object of vLLM's wherever our code uses the name.
EVERYWHERE: Mapping[str, str] = {
    "current_platform": "Platform",
    "vllm_config": "VllmConfig",
    "model_config": "ModelConfig",
    "scheduler_config": "SchedulerConfig",
    "cache_config": "CacheConfig",
    "parallel_config": "ParallelConfig",
    "input_processor": "InputProcessor",
    "renderer": "BaseRenderer",
    "scheduler_stats": "SchedulerStats",
    "engine_core": "InprocClient",
    "output_processor": "OutputProcessor",
}
#: The same for the modules in which a name has that meaning.
BY_MODULE: Mapping[str, Mapping[str, str]] = {
    "vllm": {"config": "VllmConfig"},
    "vllm_setup": {"config": "VllmConfig"},
    "vllm_kernels": {"config": "VllmConfig", "ops": "ops"},
    "vllm_core": {
        "engine": "LLMEngine",
        "_engine_core": "EngineCore",
        "outputs": "EngineCoreOutputs",
        "request": "EngineCoreRequest",
    },
    "vllm_client": {"output": "RequestOutput", "request": "EngineCoreRequest"},
    "vllm_seeds": {"runner": "CPUModelRunner"},
}
#: What every enumeration has.
_ENUM = {"name", "value"}
_MODULE = re.compile(r"vllm(\.\w+)+")
_ENVIRONMENT = re.compile(r"VLLM_(?!BATCH_)[A-Z0-9_]+")
_UNKNOWN: Classes = frozenset()


@dataclass
class _Listed:
    """`SYMBOLS` by name."""

    uses: dict[str, Use] = field(default_factory=dict)
    modules: dict[str, set[str]] = field(default_factory=dict)
    members: dict[str, dict[str, list[Use]]] = field(default_factory=dict)

    @classmethod
    def of(cls, symbols: tuple[Symbol, ...]) -> _Listed:
        listed = cls()
        for symbol in symbols:
            use = parse_use(symbol.use) if symbol.use else Use("")
            listed.uses[use.name] = use
            listed.modules.setdefault(use.name, set()).update(symbol.modules)
            members = listed.members.setdefault(use.name, {})
            for text in symbol.members:
                member = parse_use(text)
                members.setdefault(member.name, []).append(member)
        # The operators are functions of a module that is a symbol itself.
        for name, modules in listed.modules.items():
            if "vllm.ir.ops" in modules:
                listed.members["ops"].setdefault(name, []).append(listed.uses[name])
        return listed

    @property
    def all_modules(self) -> set[str]:
        return set().union(*self.modules.values())


def unlisted(source: str, module: str, symbols: tuple[Symbol, ...] = SYMBOLS) -> list[str]:
    """What this source uses of vLLM and the list does not name, as `line: what`."""
    return _Reader(module, _Listed.of(symbols)).read(ast.parse(source))


class _Reader:
    def __init__(self, module: str, listed: _Listed) -> None:
        self._listed = listed
        self._known = {
            name: frozenset({of_class})
            for name, of_class in {**EVERYWHERE, **BY_MODULE.get(module, {})}.items()
        }
        self._found: list[tuple[int, str]] = []

    def read(self, tree: ast.Module) -> list[str]:
        self._read_imports(tree)
        self._read_texts(tree)
        self._read_scope(tree, dict(self._known))
        return [f"{line}: {text}" for line, text in sorted(set(self._found))]

    def _report(self, node: ast.AST, text: str) -> None:
        self._found.append((getattr(node, "lineno", 0), text))

    def _read_imports(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        self._report(node, f"import {alias.name}: write `from vllm… import …`")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    if node.module not in self._listed.modules.get(alias.name, ()):
                        self._report(node, f"from {node.module} import {alias.name}")
                        continue
                    use = self._listed.uses[alias.name]
                    of_class = use.of_class if use.kind is Kind.ATTRIBUTE else ""
                    self._known[alias.asname or alias.name] = frozenset({of_class or use.name})

    def _read_texts(self, tree: ast.Module) -> None:
        """Modules and environment variables that are named in a string."""
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                pattern = "".join(
                    re.escape(part.value) if isinstance(part, ast.Constant) else r"\w+"
                    for part in node.values
                    if not isinstance(part, ast.Constant) or isinstance(part.value, str)
                )
                if pattern.startswith("vllm\\.") and not any(
                    re.fullmatch(pattern, module) for module in self._listed.all_modules
                ):
                    self._report(node, ast.unparse(node))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if _ENVIRONMENT.fullmatch(node.value) and node.value not in (
                    *ENVIRONMENT,
                    *ENVIRONMENT_OF_SOME,
                ):
                    self._report(node, f"${node.value}")
                elif _MODULE.fullmatch(node.value) and not any(
                    module == node.value or module.startswith(f"{node.value}.")
                    for module in self._listed.all_modules
                ):
                    self._report(node, node.value)

    def _read_scope(self, scope: ast.AST, known: dict[str, Classes]) -> None:
        """Everything in this function or module, and then the functions in it."""
        own = list(_own_nodes(scope))
        for _ in range(2):  # a name may be used above the line that says what it is
            for node in own:
                self._learn(node, known)
        for node in own:
            if isinstance(node, ast.Attribute):
                self._classes(node, known, report=True)
            elif isinstance(node, ast.Call):
                self._check_call(node, known)
        for node in own:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                self._read_scope(node, dict(known))

    def _learn(self, node: ast.AST, known: dict[str, Classes]) -> None:
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in known:
                    known[node.name] = known[base.id]
        for target, value in pairs:
            if isinstance(target, ast.Tuple):
                for element in target.elts:
                    known.pop(ast.unparse(element), None)  # something else of this name
            if isinstance(target, ast.Name) and (classes := self._classes(value, known)):
                known[target.id] = classes

    def _classes(
        self, node: ast.expr, known: Mapping[str, Classes], *, report: bool = False
    ) -> Classes:
        """What the expression is, or of which class: empty if that is not known."""
        if isinstance(node, ast.Name):
            return known.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Subscript):
            return self._classes(node.value, known)
        if isinstance(node, ast.Await):
            return self._classes(node.value, known)
        if isinstance(node, ast.BoolOp):
            return self._classes(node.values[0], known)
        if isinstance(node, ast.Call):
            return self._returned(node, known)
        if not isinstance(node, ast.Attribute):
            return _UNKNOWN
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return known.get(node.attr, _UNKNOWN)
        owners = self._classes(node.value, known)
        return self._members(node, owners, node.attr, report=report)

    def _members(self, node: ast.AST, owners: Classes, name: str, *, report: bool) -> Classes:
        if not owners or name in _ENUM or name.startswith("__"):
            return _UNKNOWN
        uses = [use for owner in owners for use in self._listed.members[owner].get(name, ())]
        if not uses and report:
            self._report(node, f"{' or '.join(sorted(owners))}.{name}")
        return frozenset(
            use.of_class for use in uses if use.of_class and use.kind is Kind.ATTRIBUTE
        )

    def _called(self, call: ast.Call, known: Mapping[str, Classes]) -> list[Use]:
        """The listed uses of what is called."""
        function = call.func
        if isinstance(function, ast.Attribute) and not (
            isinstance(function.value, ast.Name) and function.value.id == "self"
        ):
            return [
                use
                for owner in self._classes(function.value, known)
                for use in self._listed.members[owner].get(function.attr, ())
            ]
        if isinstance(function, ast.Name):
            return [self._listed.uses[name] for name in known.get(function.id, ())]
        # `_locate("name")(…)`
        if isinstance(function, ast.Call) and function.args:
            name = function.args[0]
            if ast.unparse(function.func) == "_locate" and isinstance(name, ast.Constant):
                return [self._listed.uses[name.value]]
        return []

    def _returned(self, call: ast.Call, known: Mapping[str, Classes]) -> Classes:
        if isinstance(call.func, ast.Name) and call.func.id == "getattr":
            return self._read_by_name(call, known)
        uses = self._called(call, known)
        returned = {use.of_class for use in uses if use.of_class and use.kind is Kind.CALL}
        if not returned and isinstance(call.func, ast.Name):
            return known.get(call.func.id, _UNKNOWN)  # a class gives its instances
        return frozenset(returned)

    def _read_by_name(
        self, call: ast.Call, known: Mapping[str, Classes], *, report: bool = False
    ) -> Classes:
        """`getattr(value, "name")`"""
        value, name = call.args[:2]
        if not isinstance(name, ast.Constant):
            return _UNKNOWN
        return self._members(call, self._classes(value, known), str(name.value), report=report)

    def _check_call(self, call: ast.Call, known: Mapping[str, Classes]) -> None:
        if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "setattr"):
            self._read_by_name(call, known, report=True)
            return
        uses = [use for use in self._called(call, known) if use.kind is Kind.CALL]
        if not uses:
            return
        positional = sum(not isinstance(argument, ast.Starred) for argument in call.args)
        keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
        if not any(positional <= use.positional and keywords <= set(use.keywords) for use in uses):
            self._report(call, f"the call {ast.unparse(call)}")


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module, without those of the functions defined in it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                yield decorator
                yield from _own_nodes(decorator)
        elif not isinstance(node, ast.Lambda):
            yield from _own_nodes(node)
