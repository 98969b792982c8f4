"""A model's chat template, rendered as the engine renders it, with nothing of the engine.

Templates are Jinja in a sandbox, with the handful of extras that model authors rely on: a `tojson`
that escapes no HTML, `raise_exception`, `strftime_now`, `break` and `continue`, and the tag
`generation`, which marks a stretch and prints it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: A loop over a message's content: such a template wants the content as a list of parts.
_LOOPS_OVER_CONTENT = re.compile(
    r"for\s+\w+\s+in\s+(?:content\b|\w+(?:\.content\b|\[\s*['\"]content['\"]\s*\]))"
)


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the engine's own clock has no zone


class ChatTemplate:
    """One template's text, compiled. `special_tokens`: by name, what the template may print.

    Raises jinja2.TemplateError where the text is no template.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._template = environment.from_string(text)
        #: The names that it reads from outside: `messages`, `tools`, `enable_thinking`, …
        self.variables = frozenset(meta.find_undeclared_variables(environment.parse(text)))
        self._special_tokens = dict(special_tokens)
        self.wants_parts = _LOOPS_OVER_CONTENT.search(text) is not None
        self.knows_developer = '"developer"' in text or "'developer'" in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises jinja2.TemplateError and whatever a template may stumble on."""
        given = {k: v for k, v in (arguments or {}).items() if k in self.variables}
        return self._template.render(
            {
                **self._special_tokens,
                **given,
                "messages": messages,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
        )
