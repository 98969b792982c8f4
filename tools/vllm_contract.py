"""Check vLLM's source against the list of what our code uses of it (`vllm_symbols`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from vllm_source import (
    Definition,
    Function,
    Source,
    is_property,
    method_signature,
    why_not_callable,
)

from batch_app.engine.vllm_symbols import (
    CLIENT_NOT_OFFERED,
    ENVIRONMENT,
    ROUTES,
    SYMBOLS,
    Kind,
    Symbol,
    Use,
    parse_use,
)

#: The class of what we replace methods of -> the module or package of vLLM's that calls them, and
#: the name by which it does.
_CALLERS = {
    "EngineClient": ("vllm.entrypoints", "engine_client"),
    "InputProcessor": ("vllm.v1.engine.llm_engine", "input_processor"),
}
#: Where vLLM uses its engine client for what no route of ours reaches.
_NOT_OUR_ROUTES = ("cli", "grpc", "dev", "rl", "sagemaker", "elastic_ep", "speech_to_text")


class State(Enum):
    FOUND = "found"
    MISSING = "missing"
    CHANGED = "changed"


class Result(NamedTuple):
    """`name`: the symbol, or `class.member`. `detail`: where it is, or what is wrong with it.

    `required`: our program does not run without it.
    """

    name: str
    state: State
    detail: str
    required: bool = True

    @property
    def is_fatal(self) -> bool:
        return self.required and self.state is not State.FOUND


def check(source: Source) -> list[Result]:
    """All that our code uses, looked up in this version of vLLM."""
    results = [result for symbol in SYMBOLS for result in _check_symbol(source, symbol)]
    results += _check_routes(source)
    results += _check_environment(source)
    results += _check_client(source)
    results += _check_calls(source)
    return results


def _check_symbol(source: Source, symbol: Symbol) -> Iterator[Result]:
    use = parse_use(symbol.use) if symbol.use else None
    required = not symbol.tests_only
    name = use.name if use is not None else symbol.modules[0]
    found = locate(source, symbol)
    if found is None:
        yield Result(name, State.MISSING, f"not in {' or '.join(symbol.modules)}", required)
        return
    module, definition = found
    problem = None
    if use is not None and use.kind is Kind.CALL:
        arguments = source.signature(definition)
        if arguments is not None:
            problem = why_not_callable(arguments, use.positional, use.keywords)
    if problem:
        yield Result(name, State.CHANGED, f"{module}: {problem}", required)
    else:
        yield Result(name, State.FOUND, module, required)
    for text in symbol.members:
        member = parse_use(text)
        label = f"{name}.{member.name}"
        if member.kind is Kind.REPLACED:
            label += " (replaced)"
        yield _check_member(source, definition, member, label, required)


def locate(source: Source, symbol: Symbol) -> tuple[str, Definition] | None:
    """The first of its modules that has the symbol, and its definition."""
    for module in symbol.modules:
        if not symbol.use:
            tree = source.module(module)
            if tree is not None:
                return module, Definition(module, tree)
            continue
        found = source.find(module, parse_use(symbol.use).name)
        if found is not None:
            return module, found
    return None


def _check_member(
    source: Source, owner: Definition, use: Use, label: str, required: bool
) -> Result:
    required = required and not use.optional
    node = source.member(owner, use.name)
    if node is None:
        return Result(label, State.MISSING, f"not in {owner.module}", required)
    arguments = method_signature(node)
    if use.kind is Kind.ATTRIBUTE or is_property(node):
        return Result(label, State.FOUND, owner.module, required)
    if arguments is None:
        return Result(label, State.CHANGED, "no longer a method", required)
    if use.kind is Kind.CALL:
        problem = why_not_callable(arguments, use.positional, use.keywords)
    else:
        problem = why_not_replaceable(arguments, use)
    if problem:
        return Result(label, State.CHANGED, f"{owner.module}: {problem}", required)
    return Result(label, State.FOUND, owner.module, required)


def why_not_replaceable(theirs: ast.arguments, ours: Use) -> str | None:
    """Why a method of ours cannot stand for one of vLLM's; None if it can.

    vLLM may pass what it requires by position, under the same names. What is left to our `**` it
    must pass by keyword: `_check_calls` looks at its calls.
    """
    required = theirs.args[: len(theirs.args) - len(theirs.defaults)]
    names = [parameter.arg for parameter in required]
    if not ours.any_positional:
        if len(names) > ours.positional and not ours.any_keyword:
            return f"gets {', '.join(names)}, ours takes {', '.join(ours.keywords) or 'nothing'}"
        known = [parameter.arg for parameter in theirs.args]
        if list(ours.keywords) != known[: ours.positional]:
            return f"its parameters are {', '.join(known)}, ours {', '.join(ours.keywords)}"
    if not ours.any_keyword:
        optional = theirs.args[ours.positional :] + theirs.kwonlyargs
        if optional and not ours.any_positional:
            return f"may get {', '.join(parameter.arg for parameter in optional)}"
    return None


def _check_routes(source: Source) -> Iterator[Result]:
    """Each route takes `request` and `raw_request`, and the state it is looked up by is set."""
    functions: dict[str, list[Function]] = {}
    assigned: set[str] = set()
    for path in source.files("vllm.entrypoints"):
        text = path.read_text(encoding="utf-8")
        if "router.post" not in text and "state." not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                for decorator in node.decorator_list:
                    if route := _posted_to(decorator):
                        functions.setdefault(route, []).append(node)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and _last_name(node.value) == "state"
            ):
                assigned.add(node.attr)
    for endpoint, (route, handlers) in ROUTES.items():
        label = f"POST {route} ({endpoint.value})"
        takers = functions.get(route)
        if not takers:
            yield Result(label, State.MISSING, "no such route")
        elif any(
            [parameter.arg for parameter in taker.args.args] != ["request", "raw_request"]
            for taker in takers
        ):
            yield Result(label, State.CHANGED, "does not take (request, raw_request)")
        elif not assigned.intersection(handlers):
            yield Result(label, State.CHANGED, f"nothing sets state.{' or state.'.join(handlers)}")
        else:
            yield Result(label, State.FOUND, takers[0].name)


def _posted_to(decorator: ast.expr) -> str | None:
    if (
        isinstance(decorator, ast.Call)
        and ast.unparse(decorator.func) == "router.post"
        and decorator.args
        and isinstance(decorator.args[0], ast.Constant)
    ):
        return str(decorator.args[0].value)
    return None


def _check_environment(source: Source) -> Iterator[Result]:
    tree = source.module("vllm.envs")
    known = {
        node.value
        for node in ast.walk(tree or ast.Module([], []))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for name in ENVIRONMENT:
        present = name in known
        yield Result(
            f"${name}",
            State.FOUND if present else State.MISSING,
            "vllm.envs" if present else "not in vllm.envs",
        )


def _check_client(source: Source) -> Iterator[Result]:
    """What vLLM's serving code uses of the engine client that we give it."""
    [symbol] = [symbol for symbol in SYMBOLS if symbol.use == "EngineClient"]
    ours = {parse_use(member).name for member in symbol.members} | {"shutdown"}
    found = locate(source, symbol)
    unknown = sorted(
        name
        for name in client_attributes(source) - ours - CLIENT_NOT_OFFERED
        if found is None or _is_abstract(source, found[1], name)
    )
    if unknown:
        yield Result(
            "EngineClient as the serving code uses it", State.CHANGED, f"uses {', '.join(unknown)}"
        )
    else:
        yield Result("EngineClient as the serving code uses it", State.FOUND, "vllm.entrypoints")


def client_attributes(source: Source) -> set[str]:
    """The attributes of `engine_client` that vLLM's routes and serving objects use."""
    return {
        node.attr
        for node in _nodes(source, "vllm.entrypoints")
        if isinstance(node, ast.Attribute) and _last_name(node.value) == "engine_client"
    }


def _nodes(source: Source, module: str) -> Iterator[ast.AST]:
    """The nodes of a module, or of all modules of a package that our routes may reach."""
    paths = list(source.files(module))
    root = source.folder.joinpath(*module.split("."))
    if not paths:
        yield from ast.walk(source.module(module) or ast.Module([], []))
    for path in paths:
        if not {*path.relative_to(root).with_suffix("").parts} & {*_NOT_OUR_ROUTES}:
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _check_calls(source: Source) -> Iterator[Result]:
    """Whether vLLM calls what we replace in a way that ours can be called."""
    for symbol in SYMBOLS:
        if symbol.use.split("(")[0] not in _CALLERS:
            continue
        name = symbol.use.split("(")[0]
        module, receiver = _CALLERS[name]
        replaced = {
            use.name: use for use in map(parse_use, symbol.members) if use.kind is Kind.REPLACED
        }
        calls = [
            (node.func.attr, node)
            for node in _nodes(source, module)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in replaced
            and _last_name(node.func.value) == receiver
        ]
        for method, use in replaced.items():
            problems = {
                problem
                for called, call in calls
                if called == method and (problem := _why_not_called(use, call))
            }
            if problems:
                detail = f"{module} calls it in another way: it {'; '.join(sorted(problems))}"
                yield Result(f"{name}.{method} (calls)", State.CHANGED, detail)


def _why_not_called(ours: Use, call: ast.Call) -> str | None:
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    parameters = ast.arguments(
        posonlyargs=[],
        args=[ast.arg(name) for name in ours.keywords],
        vararg=ast.arg("args") if ours.any_positional else None,
        kwonlyargs=[],
        kw_defaults=[],
        kwarg=ast.arg("options") if ours.any_keyword else None,
        defaults=[],
    )
    spread = any(keyword.arg is None for keyword in call.keywords)
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    problem = why_not_callable(parameters, len(call.args), keywords)
    return None if spread and problem and problem.startswith("requires") else problem


def _is_abstract(source: Source, client: Definition, name: str) -> bool:
    """Whether the class itself does nothing for this name, so that ours would have to."""
    node = source.member(client, name)
    if not isinstance(node, Function):
        return True
    return any("abstract" in ast.unparse(decorator) for decorator in node.decorator_list) or any(
        isinstance(statement, ast.Raise) for statement in node.body
    )
