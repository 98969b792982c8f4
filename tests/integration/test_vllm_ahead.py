"""What the real engine gets ready while its model loads, and what comes of it."""

from __future__ import annotations

import asyncio
import json

import pytest

from batch_app.core import Endpoint
from batch_app.engine.base import EngineRequest, Outcome
from batch_app.engine.vllm import VllmEngine
from contract.engine_conformance import chat, collect_all, error_of, run

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def prepare(engine: VllmEngine, *ahead: EngineRequest, wait_s: float = 1.0) -> None:
    """As `load` does it while the model loads."""
    assert engine._requests is not None
    assert engine._loop is not None
    loading = asyncio.sleep(wait_s, True)
    assert engine._loop.run_until_complete(engine._requests.prepare(ahead, loading))


def said(outcome: Outcome) -> str:
    content: str = json.loads(outcome.body)["choices"][0]["message"]["content"]
    return content.strip()


def test_what_is_prepared_is_answered_once_it_is_submitted(vllm_engine: VllmEngine) -> None:
    plain = [chat(n, f"What is {n} + 58?", temperature=0, max_tokens=9) for n in range(30)]
    two = {"prompt": ["27 + 58", "10 + 11"], "max_tokens": 4}
    plain.append(EngineRequest(30, Endpoint.COMPLETIONS, json.dumps(two).encode()))
    wanted = run(vllm_engine, *plain)
    prepare(vllm_engine, *plain)
    before = vllm_engine.stats()
    assert vllm_engine.collect(0.2) == []
    assert (before.num_running, before.num_waiting) == (0, 0)
    vllm_engine.submit(plain[:5])
    assert sorted(collect_all(vllm_engine, range(5))) == list(range(5))  # the others wait on
    vllm_engine.submit(plain[5:])
    outcomes = collect_all(vllm_engine, range(5, 31))
    assert len(outcomes) == 26
    for outcome in wanted[5:30]:
        assert said(outcomes[outcome.number]) == said(outcome)
    assert vllm_engine._requests is not None
    assert not vllm_engine._requests._prepared
    assert vllm_engine.collect(0) == []


def test_what_is_prepared_need_not_be_what_is_submitted(vllm_engine: VllmEngine) -> None:
    refused = chat(2, temperature=-1)
    prepare(vllm_engine, chat(0, "What is 1 + 1?", max_tokens=9), chat(1), refused, chat(3))
    assert vllm_engine.collect(0.2) == []  # nor what is refused
    other, error = run(vllm_engine, chat(0, "What is 27 + 58?", temperature=0), refused)
    assert said(other) == "85"
    assert "temperature" in error_of(error)["message"]
    prepare(vllm_engine, chat(4), wait_s=0.0)  # in the middle of it
    vllm_engine.cancel([1])
    (again,) = run(vllm_engine, chat(1, "What is 27 + 58?", temperature=0))
    assert said(again) == "85"
    assert vllm_engine._requests is not None
    assert not vllm_engine._requests._prepared
    assert vllm_engine.stats().num_waiting == 0
