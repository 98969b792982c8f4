"""Policy: which fields the body of a request may have, by endpoint. Others are refused.

The lists follow vLLM 0.32's request classes and OpenAI's; docs/request_policy.md says what is left
out and why. A field that a later vLLM brings is refused until it is listed here; a test names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batch_app.constraints import (
    choices,
    grammar,
    regex,
    schema,
    schema_or_text,
    schema_text,
    within_bytes,
)
from batch_app.core import Endpoint
from batch_app.pooling_policy import EMBEDDINGS, RERANK, SCORE
from batch_app.shapes import (
    BodyLimits,
    Check,
    LineProblem,
    array,
    at_most,
    between,
    boolean,
    empty,
    fields,
    image,
    image_or_url,
    integer,
    kind,
    mapping,
    number,
    one_of,
    problem,
    record,
    scalar,
    stop_strings,
    string_or,
    text,
    text_or,
    text_up_to,
    texts,
    variants,
    wrong_type,
)

#: Refused in every body, whatever the endpoint: the field, and why.
REFUSED: Mapping[str, str] = {
    "allowed_token_ids": "It can change the tokens of other requests.",
    "bad_words": "It can change the tokens of other requests.",
    "best_of": 'Use "n".',
    "chat_template": "The model's own template is used; a request may not bring code.",
    "ec_transfer_params": "It is for servers that work together.",
    "function_call": 'Use "tool_choice".',
    "functions": 'Use "tools".',
    "guided_choice": 'Use "structured_outputs".',
    "guided_grammar": 'Use "structured_outputs".',
    "guided_json": 'Use "response_format" or "structured_outputs".',
    "guided_regex": 'Use "structured_outputs".',
    "kv_transfer_params": "It is for servers that work together.",
    "logprob_token_ids": "It is not bounded.",
    "lora_path": "Adapters are named in the registry, never by a request.",
    "lora_request": "Adapters are named in the registry, never by a request.",
    "media_io_kwargs": "How media are read is the operator's to say.",
    "mm_payload": "Tensors are not part of an answer.",
    "mm_processor_kwargs": "How media are read is the operator's to say.",
    "previous_input_messages": "Send the whole conversation in the request.",
    "previous_response_id": "Nothing is kept between requests: send the whole conversation.",
    "priority": "Requests of a batch have none; the batch has.",
    "prompt_embeds": "Send the text.",
    "request_id": "The server gives each request its own; yours is custom_id.",
    "return_mm_kwargs": "Tensors are not part of an answer.",
    "routed_experts_prompt_start": "It is not bounded.",
    "session_id": "Requests of a batch belong to none.",
    "stream_interval": "Results are written to a file.",
    "stream_options": "Results are written to a file.",
    "vllm_xargs": "It reaches the engine's insides.",
}

#: How many times `max_schema_bytes` all tools of a request may take together: a model that has to
#: call one of them is bound to a schema made of all.
MAX_TOOLS_IN_SCHEMAS = 4
#: Of one message's content.
MAX_PARTS = 1024

_sampling: dict[str, Check] = {
    "model": text,
    "temperature": number,
    "top_p": number,
    "top_k": integer,
    "min_p": number,
    "seed": integer,
    "presence_penalty": number,
    "frequency_penalty": number,
    "repetition_penalty": number,
    "logit_bias": mapping(number, most=1024),
    "stop": stop_strings,
    "stop_token_ids": array(integer, most=256),
    "include_stop_str_in_output": boolean,
    "ignore_eos": boolean,
    "skip_special_tokens": boolean,
    "watermarking": boolean,
    "cache_salt": text_up_to(128),
    "structured_outputs": record(
        (),
        json=schema_or_text,
        regex=regex,
        choice=choices,
        grammar=grammar,
        json_object=boolean,
        disable_any_whitespace=boolean,
        disable_additional_properties=boolean,
        whitespace_pattern=regex,
        structural_tag=schema_text,
    ),
    # What OpenAI's clients send along; no part of the answer depends on it.
    "user": text,
    "metadata": mapping(text_up_to(512), most=16),
    "store": one_of(False),
    "service_tier": text_up_to(64),
    "safety_identifier": text_up_to(512),
    "prompt_cache_key": text_up_to(512),
    "prompt_cache_retention": text_up_to(64),
}
_generation: dict[str, Check] = _sampling | {
    "max_tokens": at_most("max_output_tokens"),
    "min_tokens": at_most("max_output_tokens"),
    "n": at_most("max_n"),
    "use_beam_search": boolean,
    "length_penalty": number,
    "spaces_between_special_tokens": boolean,
    "add_special_tokens": boolean,
    "echo": boolean,
    "truncate_prompt_tokens": integer,
    "truncation_side": one_of("left", "right"),
    "prompt_logprobs": at_most("max_logprobs", least=0),
    "return_tokens_as_token_ids": boolean,
    "return_token_ids": boolean,
    "return_token_offsets": boolean,
    "repetition_detection": record(
        (),
        max_pattern_size=between(0, 256),
        min_pattern_size=between(0, 256),
        min_count=between(0, 1 << 20),
    ),
    "thinking_token_budget": integer,
    "response_format": variants(
        text=record(("type",), type=text),
        json_object=record(("type",), type=text),
        json_schema=record(
            ("type", "json_schema"),
            type=text,
            json_schema=record(
                ("name",), name=text, description=text, schema=schema, strict=boolean
            ),
        ),
        structural_tag=record(
            ("type",),
            type=text,
            format=schema,
            structures=within_bytes(
                array(record((), begin=text, end=text, schema=schema), most=128)
            ),
            triggers=within_bytes(array(text, most=128)),
        ),
    ),
}

_function = record(("name",), name=text, description=text, parameters=schema, strict=boolean)
_tools = within_bytes(
    array(
        variants(function=record(("function",), type=text, function=_function)), setting="max_tools"
    ),
    MAX_TOOLS_IN_SCHEMAS,
)
_tool_call = record(
    ("function",),
    id=text,
    type=one_of("function"),
    index=integer,
    function=record(("name",), name=text, arguments=text),
)


_part = string_or(
    variants(
        text=record(("text",), type=text, text=text),
        image_url=record(
            ("image_url",),
            type=text,
            image_url=image_or_url,
        ),
        refusal=record(("refusal",), type=text, refusal=text),
        thinking=record(("thinking",), type=text, thinking=text, closed=boolean),
        input_text=record(("text",), type=text, text=text),
        output_text=record(("text",), type=text, text=text, annotations=empty, logprobs=empty),
    )
)
_message_fields: dict[str, Check] = {
    "role": text_up_to(64),
    "content": text_or(array(_part, most=MAX_PARTS)),
    "name": text,
    "tool_calls": array(_tool_call, most=128),
    "tool_call_id": text,
    "tools": _tools,
    "reasoning": text,
    "reasoning_content": text,
    "refusal": text,
    # An answer's message, sent again as it came.
    "annotations": empty,
    "audio": empty,
    "function_call": empty,
}


def _require_few_messages(value: list[Any], name: str, limits: BodyLimits) -> None:
    if len(value) > limits.max_messages:
        raise problem(
            name, f'"{name}" must have at most {limits.max_messages} entries (max_messages).'
        )


def _messages(value: Any, name: str, limits: BodyLimits) -> None:
    if not isinstance(value, list) or not value:
        raise problem(name, f'"{name}" must be a list of at least one message.')
    _require_few_messages(value, name, limits)
    for position, message in enumerate(value):
        at = f"{name}[{position}]"
        if not isinstance(message, dict):
            raise problem(at, f"Message {position} must be an object, not {kind(message)}.")
        if not isinstance(message.get("role"), str):
            raise problem(
                f"{at}.role",
                f'Message {position} needs a "role": "user", "system" or "assistant", for example.',
            )
        fields(message, at, limits, _message_fields)


_choice = string_or(
    variants(
        function=record(("function",), type=text, function=record(("name",), name=text)),
    )
)
_documents = array(mapping(text, most=64), setting="max_inputs")

_CHAT = _generation | {
    "messages": _messages,
    "max_completion_tokens": at_most("max_output_tokens"),
    "logprobs": boolean,
    "top_logprobs": at_most("max_logprobs", least=0),
    "tools": _tools,
    "tool_choice": _choice,
    "parallel_tool_calls": boolean,
    "reasoning_effort": text_up_to(16),
    "include_reasoning": boolean,
    "add_generation_prompt": boolean,
    "continue_final_message": boolean,
    "documents": _documents,
    "chat_template_kwargs": mapping(scalar, most=16),
    "return_prompt_text": boolean,
    "modalities": array(one_of("text"), most=1),
    "verbosity": text_up_to(16),
}

_COMPLETIONS = _generation | {
    "prompt": texts,
    "suffix": text,
    "logprobs": at_most("max_logprobs", least=0),
}

_response_parts = text_or(
    array(
        variants(
            input_text=record(("text",), type=text, text=text),
            output_text=record(("text",), type=text, text=text, annotations=empty, logprobs=empty),
            text=record(("text",), type=text, text=text),
            refusal=record(("refusal",), type=text, refusal=text),
            input_image=record(("image_url",), type=text, image_url=image, detail=text_up_to(16)),
        ),
        most=MAX_PARTS,
    )
)
_reasoning_texts = array(record(("text",), type=text, text=text))
_response_message = record(
    ("role", "content"),
    type=one_of("message"),
    id=text,
    status=text_up_to(64),
    role=text_up_to(64),
    phase=text_up_to(64),
    content=_response_parts,
)
_response_items = variants(
    message=_response_message,
    function_call=record(
        ("name", "arguments", "call_id"),
        type=text,
        id=text,
        status=text_up_to(64),
        call_id=text,
        name=text,
        arguments=text,
    ),
    function_call_output=record(
        ("call_id", "output"),
        type=text,
        id=text,
        status=text_up_to(64),
        call_id=text,
        output=_response_parts,
    ),
    reasoning=record(
        (),
        type=text,
        id=text,
        status=text_up_to(64),
        summary=_reasoning_texts,
        content=_reasoning_texts,
        encrypted_content=empty,
    ),
)


def _response_input(value: Any, name: str, limits: BodyLimits) -> None:
    if isinstance(value, str):
        return
    if not isinstance(value, list):
        raise wrong_type(name, "a string or a list", value)
    _require_few_messages(value, name, limits)
    for position, item in enumerate(value):
        is_message = isinstance(item, dict) and "type" not in item
        check = _response_message if is_message else _response_items
        check(item, f"{name}[{position}]", limits)


_RESPONSES = _sampling | {
    "input": _response_input,
    "instructions": text,
    "max_output_tokens": at_most("max_output_tokens"),
    "max_tool_calls": integer,
    "background": one_of(False),
    "include": array(text_up_to(64), most=16),
    "include_reasoning": boolean,
    "reasoning": record(
        (), effort=text_up_to(16), summary=text_up_to(16), generate_summary=text_up_to(16)
    ),
    "text": record(
        (),
        verbosity=text_up_to(16),
        format=variants(
            text=record(("type",), type=text),
            json_object=record(("type",), type=text),
            json_schema=record(
                ("type", "schema"),
                type=text,
                name=text,
                description=text,
                schema=schema,
                strict=boolean,
            ),
        ),
    ),
    "tools": within_bytes(
        array(
            variants(
                function=record(
                    ("name",),
                    type=text,
                    name=text,
                    description=text,
                    parameters=schema,
                    strict=boolean,
                )
            ),
            setting="max_tools",
        ),
        MAX_TOOLS_IN_SCHEMAS,
    ),
    "tool_choice": string_or(variants(function=record(("name",), type=text, name=text))),
    "parallel_tool_calls": boolean,
    "top_logprobs": at_most("max_logprobs", least=0),
    "truncation": one_of("auto", "disabled"),
    "enable_response_messages": boolean,
    "chat_template_kwargs": mapping(scalar, most=16),
}

#: By endpoint: the fields of the body that may be there, each with its check.
ALLOWED: Mapping[str, Mapping[str, Check]] = {
    Endpoint.CHAT_COMPLETIONS.value: _CHAT,
    Endpoint.COMPLETIONS.value: _COMPLETIONS,
    Endpoint.RESPONSES.value: _RESPONSES,
    Endpoint.EMBEDDINGS.value: EMBEDDINGS,
    Endpoint.SCORE.value: SCORE,
    Endpoint.RERANK.value: RERANK,
}
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    Endpoint.CHAT_COMPLETIONS.value: ("messages",),
    Endpoint.COMPLETIONS.value: ("prompt",),
    Endpoint.EMBEDDINGS.value: ("input",),
    Endpoint.RESPONSES.value: ("input",),
    Endpoint.SCORE.value: (),  # vLLM takes several spellings of the pair
    Endpoint.RERANK.value: ("query", "documents"),
}


def _meant(body: Mapping[str, Any]) -> str:
    """A hint for a body that another endpoint has the fields of; empty where there is none."""
    for endpoint, needed in _REQUIRED.items():
        if needed and all(body.get(field) is not None for field in needed):
            return f' With "{needed[0]}", "url" is {endpoint}.'
    return ""


def check_body(
    endpoint: str, body: Mapping[str, Any], limits: BodyLimits, *, without: str | None = None
) -> None:
    """Hold a request's body to the policy. `without`: a field that has been checked already.

    Raises:
        LineProblem: it names the field, and says what to do.
    """
    if body.get("stream"):
        raise LineProblem(
            "invalid_request",
            '"stream" can\'t be true in a batch: results are written to a file. Leave it out.',
            "body.stream",
        )
    for field in _REQUIRED[endpoint]:
        if body.get(field) is None:
            raise LineProblem(
                "missing_required_parameter",
                f'The body has no "{field}".{_meant(body)}',
                f"body.{field}",
            )
    rest = {key: value for key, value in body.items() if key not in ("stream", without)}
    if (stream := body.get("stream")) is not None:
        boolean(stream, "stream", limits)
    fields(rest, "", limits, ALLOWED[endpoint], REFUSED)
    prompts = body.get("prompt")
    if (
        endpoint == Endpoint.COMPLETIONS
        and isinstance(prompts, list)
        and len(prompts) * (body.get("n") or 1) > limits.max_inputs
    ):
        raise problem(
            "n", f'"n" times the prompts must be at most {limits.max_inputs} (max_inputs).'
        )


#: Among a model's `chat_template_kwargs`: every name is allowed.
ANY = "*"


def check_template_arguments(names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """`chat_template_kwargs` of a request, against what the model's registry entry allows."""
    for name in names:
        if name not in allowed and ANY not in allowed:
            known = ", ".join(allowed) or "none"
            raise problem(
                "chat_template_kwargs",
                f"chat_template_kwargs.{name[:64]} is refused. The registry allows this model: "
                f"{known}.",
            )
