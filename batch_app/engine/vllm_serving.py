"""vLLM's own OpenAI server, without its sockets.

`vllm serve` is a FastAPI application over an `EngineClient`. `OpenAIApp` builds that application
and calls its route functions directly, so a body is the body of `vllm serve` by construction. What
only matters with a client on a socket (middleware, watching for its disconnect) is skipped. What
vLLM refuses before a route function runs (wrong types, missing fields) goes through the whole
application, which then says so in its own words.

vLLM moves its modules between releases: `vllm_symbols` lists where each one keeps them.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import typing
from argparse import Namespace
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
from pydantic import TypeAdapter
from starlette.requests import Request
from vllm.utils.argparse_utils import FlexibleArgumentParser

from batch_app.engine.vllm_symbols import ROUTES, locations

#: Arguments that would write prompts or answers to the log, or that are set from elsewhere.
_REFUSED = frozenset(
    {
        "config",
        "enable_log_deltas",
        "enable_log_outputs",
        "enable_log_requests",
        "help",
        "model",
        "served_model_name",
    }
)


def _locate(name: str) -> Any:
    """The object `name` from wherever this version of vLLM keeps it."""
    modules = locations(name)
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this version of vLLM has no {name} in any of: {', '.join(modules)}")


class ArgumentError(ValueError):
    """An engine argument is unknown to vLLM, or its value is refused."""


class _RaisingParser(FlexibleArgumentParser):  # type: ignore[misc]
    """vLLM's parser, except that it raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


def serve_args(model: str, served_name: str, arguments: Mapping[str, Any]) -> Namespace:
    """The arguments of `vllm serve`, parsed by its own parser so that they mean the same.

    `arguments` maps the options' names (`max_model_len`, `tool_call_parser`) to values: numbers,
    strings, booleans, lists, or mappings where vLLM takes JSON. None leaves vLLM's default.

    Raises:
        ArgumentError: vLLM knows no such argument or refuses its value.
    """
    parser = _locate("make_arg_parser")(_RaisingParser())
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words = ["--model", model, "--served-model-name", served_name]
    for name, value in arguments.items():
        action = actions.get(name)
        if action is None:
            raise ArgumentError(f"unknown engine argument {name!r}")
        if name in _REFUSED:
            raise ArgumentError(f"the engine argument {name!r} cannot be set here")
        if value is None:
            continue
        option = next(o for o in action.option_strings if o.startswith("--"))
        if isinstance(value, bool) and action.nargs == 0:
            negation = "--no-" + option.removeprefix("--")
            if value:
                words.append(option)
            elif negation in action.option_strings:
                words.append(negation)
        elif isinstance(value, Mapping):
            words += [option, json.dumps(value)]
        elif isinstance(value, list | tuple):
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={value}")
    args: Namespace = parser.parse_args(words)
    _locate("validate_parsed_serve_args")(args)
    if args.tool_parser_plugin:
        _locate("ToolParserManager").import_tool_parser(args.tool_parser_plugin)
    if getattr(args, "reasoning_parser_plugin", None):
        _locate("ReasoningParserManager").import_reasoning_parser(args.reasoning_parser_plugin)
    # Checked here, for vLLM notices only once the model is loaded.
    parsers = (
        ("tool_call_parser", "ToolParserManager"),
        ("reasoning_parser", "ReasoningParserManager"),
    )
    for name, manager in parsers:
        known = _locate(manager).list_registered()
        if (wanted := getattr(args, name, None)) and wanted not in known:
            raise ArgumentError(
                f"unknown {name} {wanted!r}; vLLM knows: {', '.join(sorted(known))}"
            )
    # The application is called in-process by its owner: VLLM_API_KEY of the environment, which
    # would close it, is meant for somebody else's server.
    args.api_key = [""]
    return args


class _Route:
    """One of vLLM's route functions, with the type of its request."""

    def __init__(self, path: str, function: Any, request_type: Any) -> None:
        self.path = path
        self.function = function
        self.parse = TypeAdapter(request_type).validate_python


class OpenAIApp:
    """vLLM's application over `client`. Call everything from one event loop."""

    def __init__(self, app: Any, routes: Mapping[str, _Route]) -> None:
        self.asgi = app
        self._routes = routes
        self._stack: Any = None

    @staticmethod
    def prepare() -> None:
        """Import what `create` needs; that takes a second or two."""
        _locate("build_app")
        _locate("init_app_state")

    @classmethod
    async def create(cls, client: Any, args: Namespace) -> OpenAIApp:
        """Build the application, its serving objects included (loads the chat template)."""
        tasks = await client.get_supported_tasks()
        app = _locate("build_app")(args, tasks, client.model_config)
        await _locate("init_app_state")(client, app.state, args, tasks)
        # vLLM's handler of engine errors asks the web server to stop; there is none.
        app.state.server = SimpleNamespace(should_exit=False)
        routes = {}
        for endpoint, (path, handlers) in ROUTES.items():
            function = _route_function(app, path)
            handler = any(getattr(app.state, name, None) is not None for name in handlers)
            if function is not None and handler:
                routes[endpoint.value] = _Route(path, function, _request_type(function))
        return cls(app, routes)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints that the loaded model supports."""
        return tuple(self._routes)

    def supports(self, endpoint: str) -> bool:
        return endpoint in self._routes

    def parse(self, endpoint: str, body: dict[str, Any]) -> Any | None:
        """The request as vLLM's type, or None when vLLM refuses it (`refusal` says how)."""
        try:
            return self._routes[endpoint].parse(body)
        except Exception:  # noqa: BLE001 - vLLM's own validators raise all sorts of things
            return None

    async def answer(self, endpoint: str, request: Any) -> tuple[int, bytes]:
        """Status and body that `vllm serve` answers to this request, be it an error."""
        raw = Request({**_SCOPE, "path": self._routes[endpoint].path, "app": self.asgi})
        try:
            response = await self._routes[endpoint].function(request, raw)
        except Exception as error:  # noqa: BLE001 - every exception of a request is its own outcome
            response = await self._error_response(raw, error)
        body = getattr(response, "body", None)
        if body is None:
            return 400, error_body("Only JSON responses are supported", param="encoding_format")
        return int(response.status_code), bytes(body)

    async def refusal(self, endpoint: str, body: bytes) -> tuple[int, bytes]:
        """What the whole application says to a body that `parse` would not take."""
        sent: dict[str, Any] = {"status": 500, "body": b""}
        received = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not received:
                await asyncio.Event().wait()  # Nobody hangs up.
            return received.pop()

        async def send(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
            elif message["type"] == "http.response.body":
                sent["body"] += message.get("body", b"")

        path = self._routes[endpoint].path
        scope = {**_SCOPE, "path": path, "raw_path": path.encode(), "state": {}}
        await self.asgi({**scope, "extensions": {}}, receive, send)
        return sent["status"], sent["body"]

    async def _error_response(self, raw: Request, error: Exception) -> Any:
        """The response of the handler that the application has for this exception."""
        for kind in type(error).__mro__:
            handler = self.asgi.exception_handlers.get(kind)
            if handler is not None:
                return await handler(raw, error)
        raise error


_SCOPE: Mapping[str, Any] = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "root_path": "",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    "client": ("127.0.0.1", 0),
    "server": ("localhost", 80),
}


def _route_function(app: Any, path: str) -> Any | None:
    """The function behind POST `path`, free of the decorators that watch a socket."""
    for route in app.routes:
        if getattr(route, "path", None) == path and "POST" in (
            getattr(route, "methods", None) or ()
        ):
            return inspect.unwrap(route.endpoint)
    return None


def _request_type(function: Any) -> Any:
    """What FastAPI would parse the body into: the annotation of the parameter `request`."""
    return typing.get_type_hints(function)["request"]


def error_body(
    message: str, *, kind: str = "BadRequestError", param: str | None = None, code: int = 400
) -> bytes:
    """An error in the shape of vLLM's own."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}
    )
