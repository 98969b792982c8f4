"""Our allow-list against vLLM's request classes: a new vLLM shows here what is undecided."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pytest

from batch_app.policy import ALLOWED, REFUSED

# vLLM's own imports warn.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

#: Fields that vLLM has and `check_body` judges apart from the lists.
ELSEWHERE = {"stream"}
#: Fields of a response's body that mean something else under the same name elsewhere.
REFUSED_BY_ENDPOINT = {"/v1/responses": {"prompt"}}


def _classes() -> Iterator[tuple[str, type]]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest
    from vllm.entrypoints.pooling.scoring import protocol as scoring

    yield "/v1/chat/completions", ChatCompletionRequest
    yield "/v1/completions", CompletionRequest
    yield "/v1/responses", ResponsesRequest
    yield "/v1/embeddings", EmbeddingCompletionRequest
    yield "/v1/rerank", scoring.RerankRequest
    for request in typing.get_args(scoring.ScoreRequest):
        yield "/v1/score", request


def test_every_field_of_vllm_is_decided() -> None:
    undecided = {}
    for endpoint, request in _classes():
        fields = set(request.model_fields)  # type: ignore[attr-defined]
        assert "model" in fields
        undecided[request.__name__] = (
            fields
            - set(ALLOWED[endpoint])
            - set(REFUSED)
            - ELSEWHERE
            - REFUSED_BY_ENDPOINT.get(endpoint, set())
        )
    assert len(undecided) == 9
    assert undecided == {name: set() for name in undecided}


def test_nothing_is_both_allowed_and_refused() -> None:
    for fields in ALLOWED.values():
        assert not set(fields) & set(REFUSED)
