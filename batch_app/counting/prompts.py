"""From the body of a request to the texts whose tokens the engine will count as its prompt.

Follows what vLLM 0.32 does with each endpoint's body. What can't be followed (images, the layout of
a reranker's pairs) is left out or approximated, and said so: `Prompt.is_exact`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_app.core import Endpoint
from batch_app.counting.template import ChatTemplate


@dataclass(slots=True)
class Prompt:
    """What one request asks the engine to read.

    `texts` are to be tokenised, with the tokenizer's special tokens around each where
    `special_tokens` says so; `num_ids` tokens come as they are. `keeps` bounds the sum.
    `has_fixed_length`: its answer takes all the tokens it may.
    """

    texts: list[str] = field(default_factory=list)
    special_tokens: bool = True
    num_ids: int = 0
    keeps: int | None = None
    is_exact: bool = True
    has_fixed_length: bool = False


def prompt_of(endpoint: str, body: Mapping[str, Any], template: ChatTemplate | None) -> Prompt:
    """The prompt of a body that passed intake.

    Raises whatever the template raises, KeyError, TypeError or ValueError: the engine will refuse
    the request.
    """
    if endpoint == Endpoint.CHAT_COMPLETIONS:
        prompt = _chat(body, body["messages"], template)
    elif endpoint == Endpoint.RESPONSES:
        prompt = _chat(body, _messages_of_response(body), template)
        prompt.is_exact = False
    elif endpoint == Endpoint.COMPLETIONS:
        prompt = _plain(body.get("prompt"))
        prompt.special_tokens = body.get("add_special_tokens", True)
    elif endpoint == Endpoint.EMBEDDINGS:
        if body.get("messages") is not None:
            prompt = _chat(body, body["messages"], template, generates=False)
        else:
            prompt = _plain(body.get("input"))
            prompt.special_tokens = body.get("add_special_tokens", True)
    else:
        prompt = _pairs(body)
    keeps = body.get("truncate_prompt_tokens")
    if isinstance(keeps, int) and keeps >= 0:
        prompt.keeps = keeps
    prompt.has_fixed_length = _has_fixed_length(body)
    return prompt


def _has_fixed_length(body: Mapping[str, Any]) -> bool:
    if body.get("ignore_eos") and not body.get("stop"):
        return True
    most = body.get("max_completion_tokens") or body.get("max_tokens") or 0
    return 0 < most <= (body.get("min_tokens") or 0)


# -- prompts that come as they are -----------------------------------------------------------------


def _plain(value: Any) -> Prompt:
    """A text, a list of token ids, or a list of either."""
    if isinstance(value, str):
        return Prompt([value])
    if not isinstance(value, list):
        raise TypeError("no prompt")
    if value and all(isinstance(entry, int) for entry in value):
        return Prompt(num_ids=len(value))
    prompt = Prompt()
    for entry in value:
        if isinstance(entry, str):
            prompt.texts.append(entry)
        else:
            prompt.num_ids += len(entry)
    return prompt


def _pairs(body: Mapping[str, Any]) -> Prompt:
    """Texts that are scored against each other, each with its partner."""
    left = _texts(_first(body, "query", "queries", "data_1", "text_1"))
    right = _texts(_first(body, "documents", "items", "data_2", "text_2"))
    if len(left) == 1:
        left = left * len(right)
    return Prompt([*left, *right], is_exact=False)


def _first(body: Mapping[str, Any], *names: str) -> Any:
    return next(body[name] for name in names if body.get(name) is not None)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):  # {"content": [parts]}
        return [_joined(value.get("content"))]
    return [text for entry in value for text in _texts(entry)]


# -- chats -----------------------------------------------------------------------------------------


def _chat(
    body: Mapping[str, Any],
    said: Sequence[Mapping[str, Any]],
    template: ChatTemplate | None,
    *,
    generates: bool = True,
) -> Prompt:
    if template is None:
        raise ValueError("the model has no chat template")
    arguments = dict(body.get("chat_template_kwargs") or {})
    effort = body.get("reasoning_effort")
    if effort is not None:
        arguments.setdefault("reasoning_effort", effort)
        arguments.setdefault("enable_thinking", effort != "none")
    exact = True
    messages = []
    for message in said:
        messages.append(_message(message, template.wants_parts))
        exact = exact and _is_text(message.get("content"))
    if not template.knows_developer:
        for one in messages:
            if one["role"] == "developer":
                one["role"] = "system"
    text = template.render(
        messages,
        tools=_tools(body),
        documents=body.get("documents"),
        add_generation_prompt=body.get("add_generation_prompt", generates),
        arguments=arguments,
    )
    if body.get("continue_final_message"):
        exact = False  # the end of the last message's frame is cut off: a few tokens
    return Prompt([text], special_tokens=body.get("add_special_tokens", False), is_exact=exact)


def _message(message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    role, content = message["role"], message.get("content")
    result: dict[str, Any] = {"role": role}
    if wants_parts and role != "tool":
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        result["content"] = [
            {"type": "text", "text": _text(part)} if _is_text(part) else part
            for part in parts or ()
        ]
    else:
        result["content"] = _joined(content)
    if role == "assistant":
        if calls := message.get("tool_calls"):
            result["tool_calls"] = [_call(call) for call in calls]
        if (reasoning := message.get("reasoning")) is not None:
            result["reasoning"] = result["reasoning_content"] = reasoning
    elif role == "tool" and "tool_call_id" in message:
        result["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        result["name"] = message["name"]
    return result


def _joined(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_text(part) for part in content if _is_text(part))


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if part.get("text") is not None else part.get("refusal")
    return text if isinstance(text, str) else ""


def _is_text(content: Any) -> bool:
    """Whether this content, or part of one, is text alone."""
    if content is None or isinstance(content, str):
        return True
    if isinstance(content, list):
        return all(_is_text(part) for part in content)
    return isinstance(content, dict) and content.get("type") in (
        "text",
        "input_text",
        "output_text",
        "refusal",
    )


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except ValueError:
            function["arguments"] = {}
    elif arguments is None:
        function["arguments"] = {}
    return {**call, "function": function}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools as vLLM hands them to a template: all fields in its order, null where unset."""
    tools = body.get("tools")
    if not tools:
        return None
    return [_tool(tool) for tool in tools]


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    said = tool.get("function") or tool  # the Responses API has it flat
    function = {name: said.get(name) for name in ("name", "description", "parameters")}
    if said.get("strict") is not None:
        function["strict"] = said["strict"]
    return {"type": tool.get("type", "function"), "function": function}


def _messages_of_response(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    said = body["input"]
    if isinstance(said, str):
        return [*messages, {"role": "user", "content": said}]
    for item in said:
        if "role" in item:
            messages.append({"role": item["role"], "content": _joined(item.get("content"))})
        elif "output" in item:
            messages.append({"role": "tool", "content": _joined(item["output"])})
        elif "arguments" in item:
            function = {"name": item.get("name"), "arguments": item["arguments"]}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return messages
