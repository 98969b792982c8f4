"""Policy: which fields the body of a request for embeddings or scores may have.

What these endpoints have in common: a pooling model answers with numbers, not with text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batch_app.shapes import (
    BodyLimits,
    Check,
    array,
    boolean,
    image_or_url,
    integer,
    mapping,
    one_of,
    record,
    scalar,
    string_or,
    text,
    text_up_to,
    texts,
    variants,
)

_pooling: dict[str, Check] = {
    "model": text,
    "user": text,
    "metadata": mapping(text_up_to(512), most=16),
    "safety_identifier": text_up_to(512),
    "truncate_prompt_tokens": integer,
    "truncation_side": one_of("left", "right"),
    "padding": one_of("max_length", "do_not_pad"),
    "use_activation": boolean,
    "cache_salt": text_up_to(128),
}
EMBEDDINGS: Mapping[str, Check] = _pooling | {
    "input": texts,
    # The other two formats aren't JSON.
    "encoding_format": one_of("float", "base64"),
    "embed_dtype": one_of("float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
    "endianness": one_of("native", "big", "little"),
    "dimensions": integer,
    "add_special_tokens": boolean,
}


def _scored(value: Any, name: str, limits: BodyLimits) -> None:
    """A text, an object of content parts, or a list of these."""
    one = string_or(
        record(
            ("content",),
            content=array(
                variants(
                    text=record(("text",), type=text, text=text),
                    image_url=record(("image_url",), type=text, image_url=image_or_url),
                )
            ),
        )
    )
    if isinstance(value, list):
        array(one, setting="max_inputs")(value, name, limits)
    else:
        one(value, name, limits)


_scoring = _pooling | {
    "max_tokens_per_query": integer,
    "max_tokens_per_doc": integer,
    "instruction": text,
    "chat_template_kwargs": mapping(scalar, most=16),
    "documents": _scored,
}
SCORE: Mapping[str, Check] = _scoring | dict.fromkeys(
    ("data_1", "data_2", "text_1", "text_2", "queries", "items"), _scored
)
RERANK: Mapping[str, Check] = _scoring | {"query": _scored, "top_n": integer}
