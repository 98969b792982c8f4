"""The real engine on the demo model: right answers, in the bodies of vLLM's own server."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from batch_app.core import Endpoint, EngineLimits, LimitsTried, LoadRetry
from batch_app.engine.base import Engine, EngineRequest, Outcome
from batch_app.engine.host import EngineHost
from batch_app.engine.process import engine_environment
from batch_app.engine.vllm import VllmEngine
from batch_app.engine.vllm_core_start import StartMethod
from batch_app.engine.vllm_messages import RECEIVE_BYTES, CoreFailed, CoreLoadFailed, unframed
from batch_app.engine.vllm_process import CoreProcess
from batch_app.errors import EngineDied, EngineLoadError
from contract.engine_conformance import (
    CHAT,
    EngineConformance,
    chat,
    collect_all,
    error_of,
    run,
)
from integration.beside_vllm import Answers, Questions, ask_vllms_server, without_ids
from integration.conftest import DEMO_MODEL, demo_spec
from support.site import engine_core

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))
import demo_tasks  # noqa: E402


def request(number: int, endpoint: str, **body: Any) -> EngineRequest:
    return EngineRequest(number, endpoint, json.dumps(body).encode())


def body_of(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status_code == 200, outcome.body
    body: dict[str, Any] = json.loads(outcome.body)
    return body


def said(outcome: Outcome) -> str:
    content = body_of(outcome)["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content.strip()


class TestVllmEngine(EngineConformance):
    @pytest.fixture
    def engine(self, vllm_engine: VllmEngine) -> Iterator[Engine]:
        yield vllm_engine
        assert vllm_engine.collect(0) == []


def test_nobody_on_the_network_can_reach_it(vllm_engine: VllmEngine) -> None:
    """torch.distributed listens for its peers, of which there are none: on the loopback only."""
    run(vllm_engine, chat(0))
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1"), process.cmdline()


def test_two_hundred_answers_stand_under_their_numbers(vllm_engine: VllmEngine) -> None:
    rng = random.Random(7)
    prompts = {number: demo_tasks.random_prompt(rng) for number in range(200)}
    vllm_engine.submit(
        [chat(n, prompt, max_tokens=16, temperature=0) for n, prompt in prompts.items()]
    )
    outcomes = collect_all(vllm_engine, prompts)
    wrong = [
        number
        for number, prompt in prompts.items()
        if said(outcomes[number]) != demo_tasks.expected_answer(prompt)
    ]
    assert len(wrong) <= (1 - demo_tasks.PASS_SHARE) * len(prompts), wrong


def test_completions_with_several_prompts(vllm_engine: VllmEngine) -> None:
    (outcome,) = run(
        vllm_engine,
        request(0, Endpoint.COMPLETIONS, prompt=["27 + 58", "10 + 11"], max_tokens=4, echo=True),
    )
    body = body_of(outcome)
    assert [choice["text"][:7] for choice in body["choices"]] == ["27 + 58", "10 + 11"]
    assert outcome.completion_tokens == body["usage"]["completion_tokens"] > 0


def test_responses(vllm_engine: VllmEngine) -> None:
    (outcome,) = run(
        vllm_engine,
        request(0, Endpoint.RESPONSES, input="What is 27 + 58?", max_output_tokens=16),
    )
    body = body_of(outcome)
    assert body["object"] == "response"
    assert outcome.prompt_tokens == body["usage"]["input_tokens"] > 0
    assert outcome.completion_tokens == body["usage"]["output_tokens"] > 0


def test_sampling_parameters_are_honoured(vllm_engine: VllmEngine) -> None:
    hot = {"temperature": 2.0, "max_tokens": 24, "ignore_eos": True}
    two, logprobs, seeded, again, other, stopped, short = run(
        vllm_engine,
        chat(0, n=2, **hot),
        chat(1, logprobs=True, top_logprobs=3, temperature=0),
        chat(2, seed=11, **hot),
        chat(3, seed=11, **hot),
        chat(4, seed=12, **hot),
        chat(5, temperature=0, stop=["5"], max_tokens=16),
        chat(6, max_tokens=3, ignore_eos=True),
    )
    choices = body_of(two)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["message"]["content"] != choices[1]["message"]["content"]
    assert two.completion_tokens == 48
    tokens = body_of(logprobs)["choices"][0]["logprobs"]["content"]
    assert len(tokens) == logprobs.completion_tokens
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    assert said(seeded) == said(again) != said(other)
    assert body_of(stopped)["choices"][0]["stop_reason"] == "5"
    assert said(stopped) == "8"
    assert short.completion_tokens == 3
    assert body_of(short)["choices"][0]["finish_reason"] == "length"


def test_a_schema_binds_the_answer(vllm_engine: VllmEngine) -> None:
    schema = {"type": "object", "properties": {"sum": {"enum": [85, 7]}}, "required": ["sum"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    choice = {"choice": ["alpha", "omega"]}
    bound, refused, chosen = run(
        vllm_engine,
        chat(0, max_tokens=400, response_format=response_format),
        chat(1, response_format=broken),
        chat(2, structured_outputs=choice),
    )
    finished = body_of(bound)["choices"][0]["finish_reason"] == "stop"
    assert not finished or json.loads(said(bound))["sum"] in (85, 7)
    assert re.match(r'\{\s*("|$)', said(bound))
    assert refused.status_code == 400
    error_of(refused)
    assert said(chosen) in choice["choice"]


def test_tools_are_accepted(vllm_engine: VllmEngine) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
    (outcome,) = run(vllm_engine, chat(0, tools=[tool], tool_choice="auto"))
    assert "tool_calls" in body_of(outcome)["choices"][0]["message"] or said(outcome)


def test_what_vllm_refuses_is_refused_in_its_words(vllm_engine: VllmEngine) -> None:
    long, hot, negative, unsupported, streamed, in_background, fine = run(
        vllm_engine,
        chat(0, "What is 27 + 58? " * 2000),
        chat(1, temperature="hot"),
        chat(2, max_tokens=-1),
        request(3, Endpoint.EMBEDDINGS, input="x"),
        chat(4, stream=True),
        request(5, Endpoint.RESPONSES, input="x", background=True),
        chat(6),
    )
    assert long.status_code == 400
    assert "maximum context length" in error_of(long)["message"]
    assert hot.status_code == 400
    assert error_of(hot)["param"] == "body.temperature"
    assert negative.status_code == 400
    assert error_of(negative)["param"] == "max_tokens"
    assert unsupported.status_code == 404
    assert "does not support /v1/embeddings" in error_of(unsupported)["message"]
    assert streamed.status_code == 400
    assert error_of(streamed)["param"] == "stream"
    assert in_background.status_code == 400
    assert fine.status_code == 200


def test_cached_tokens_are_counted_but_the_body_stays_as_it_is(vllm_engine: VllmEngine) -> None:
    prompt = "Consider this sum with care. " * 60 + "What is 27 + 58?"
    (first,) = run(vllm_engine, chat(0, prompt))
    (second,) = run(vllm_engine, chat(0, prompt))
    assert first.prompt_tokens == second.prompt_tokens > 256
    assert second.cached_tokens >= 128  # a block of the CPU's cache
    assert body_of(second)["usage"]["prompt_tokens_details"] is None


def test_stats_progress_while_requests_run(vllm_engine: VllmEngine) -> None:
    before = vllm_engine.stats()
    vllm_engine.submit([chat(n, max_tokens=1900, ignore_eos=True) for n in range(4)])
    deadline = time.monotonic() + 120
    seen = [before.generation_tokens_total]
    while len(seen) < 4:
        assert time.monotonic() < deadline
        assert vllm_engine.collect(0.02) == []
        stats = vllm_engine.stats()
        if stats.generation_tokens_total > seen[-1]:
            seen.append(stats.generation_tokens_total)
    assert stats.num_running == 4
    assert stats.kv_cache_usage > 0
    vllm_engine.cancel(range(4))
    assert vllm_engine.collect(5) == []
    assert vllm_engine.stats().num_running == 0


def test_cancelling_frees_the_engine(vllm_engine: VllmEngine) -> None:
    vllm_engine.submit([chat(n, max_tokens=1900, ignore_eos=True) for n in range(300)])
    vllm_engine.collect(0.2)
    vllm_engine.cancel(range(300))
    run(vllm_engine, chat(300))
    client = vllm_engine._client
    assert client is not None
    deadline = time.monotonic() + 120
    while client.stats(not_in_engine=0, idle=False).num_running:
        assert time.monotonic() < deadline
        vllm_engine.collect(0.02)


#: Bodies that vLLM's server and we are asked, each under an endpoint.
SAME: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": "What is 27 + 58?"}], "max_tokens": 9}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "max_tokens": 3}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "max_tokens": 3}),
    (CHAT, {"messages": "Hi"}),
    (CHAT, {"messages": []}),
    (CHAT, {}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "top_p": 7}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": -1}),
    (CHAT, {"messages": [{"role": "user", "content": "long " * 3000}]}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "top_logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "required"}),
    ("/v1/completions", {"prompt": "27 + 58", "max_tokens": 5}),
    ("/v1/completions", {"prompt": ["27 + 58", "1"], "max_tokens": 5, "logprobs": 2}),
    ("/v1/completions", {"prompt": 1.5}),
    ("/v1/completions", {"prompt": ""}),
    ("/v1/responses", {"input": "What is 27 + 58?", "max_output_tokens": 9}),
    ("/v1/responses", {"input": 5}),
]


def test_a_seed_gives_the_same_however_many_steps_read_the_prompt(
    vllm_engine: VllmEngine,
) -> None:
    """On a CPU, vLLM itself dies of it where that is more than one."""
    assert vllm_engine._client is not None
    at_once = vllm_engine._client.vllm_config.scheduler_config.max_num_batched_tokens
    long = "What is 27 + 58? " * 110
    hot = {"temperature": 2.0, "max_tokens": 8, "ignore_eos": True, "seed": 5}
    (alone,) = run(vllm_engine, chat(0, f"Zero. {long}", **hot))
    assert alone.prompt_tokens < at_once
    beside = [chat(n, f"{n}. {long}", **(hot | {"seed": n})) for n in range(1, 15)]
    outcomes = run(vllm_engine, *beside, chat(15, f"Zero. {long}", **hot))
    assert sum(outcome.prompt_tokens for outcome in outcomes) > 2 * at_once
    assert {outcome.status_code for outcome in outcomes} == {200}
    assert said(outcomes[-1]) == said(alone)
    again = run(vllm_engine, *reversed(beside))
    assert [said(one) for one in reversed(again)] == [said(one) for one in outcomes[:-1]]


@pytest.mark.parametrize(("endpoint", "body"), SAME)
def test_bodies_are_those_of_vllms_own_server(
    vllm_engine: VllmEngine, endpoint: str, body: dict[str, Any]
) -> None:
    body = {"temperature": 0, "model": "demo"} | body
    status, theirs = ask_vllms_server(vllm_engine, endpoint, body)
    (ours,) = run(vllm_engine, request(0, endpoint, **body))
    assert ours.status_code == status
    assert without_ids(json.loads(ours.body)) == without_ids(json.loads(theirs))


#: The same for a pooling model: what is asked, and the status of both answers.
SAME_POOLING: list[tuple[str, dict[str, Any], int]] = [
    (Endpoint.EMBEDDINGS, {"input": "What is 27 + 58?"}, 200),
    (Endpoint.EMBEDDINGS, {"input": ["What is 27 + 58?", "Paris"]}, 200),
    (Endpoint.EMBEDDINGS, {"input": [[5, 6, 7], [8]]}, 200),
    (Endpoint.EMBEDDINGS, {"messages": [{"role": "user", "content": "Hi"}]}, 200),
    (Endpoint.EMBEDDINGS, {"input": "Paris", "encoding_format": "base64"}, 200),
    (Endpoint.EMBEDDINGS, {"input": "Paris", "dimensions": 32}, 200),
    (Endpoint.EMBEDDINGS, {"input": "Paris", "dimensions": 33}, 400),
    (Endpoint.EMBEDDINGS, {"input": "Paris", "encoding_format": "morse"}, 400),
    (Endpoint.EMBEDDINGS, {"input": "long " * 3000}, 400),
    (Endpoint.EMBEDDINGS, {"input": 5.5}, 400),
    (Endpoint.EMBEDDINGS, {}, 400),
    (Endpoint.SCORE, {"text_1": "Paris", "text_2": ["Paris", "85"]}, 200),
    (Endpoint.SCORE, {"queries": ["Paris", "85"], "documents": ["85", "Paris"]}, 200),
    (Endpoint.SCORE, {"text_1": ["Paris", "85"], "text_2": ["1", "2", "3"]}, 400),
    (Endpoint.SCORE, {"text_1": "Paris"}, 400),
    (Endpoint.RERANK, {"query": "Paris", "documents": ["85", "Paris"]}, 200),
    (Endpoint.RERANK, {"query": "Paris", "documents": ["85", "Paris"], "top_n": 1}, 200),
    (Endpoint.RERANK, {"query": "Paris", "documents": ["85"], "top_n": -1}, 400),
    (Endpoint.RERANK, {"query": "Paris", "documents": []}, 400),
    (Endpoint.RERANK, {"documents": ["85"]}, 400),
]


@pytest.mark.long
def test_embeddings_score_and_rerank_in_a_process_of_their_own(tmp_path: Path) -> None:
    spec = demo_spec(
        runner="pooling",
        convert="embed",
        hf_overrides={"matryoshka_dimensions": [32, 64]},
        max_num_seqs=1,  # the last digits depend on what else is in a step
    )
    same = [(endpoint, {"model": "demo"} | body) for endpoint, body, _ in SAME_POOLING]
    asked, answered, log = tmp_path / "asked", tmp_path / "answered", tmp_path / "engine.log"
    asked.write_bytes(msgspec.json.encode(Questions(spec, [*same, (CHAT, {"messages": "Hi"})])))
    with log.open("wb") as output:
        ended = subprocess.run(
            [sys.executable, "-m", "integration.beside_vllm", str(asked), str(answered)],
            cwd=REPOSITORY,
            env=engine_environment(os.environ) | {"PYTHONPATH": str(REPOSITORY / "tests")},
            stdout=output,
            stderr=output,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 0, log.read_text(errors="replace")
    answers = msgspec.msgpack.decode(answered.read_bytes(), type=Answers)
    assert set(answers.info.endpoints) == {Endpoint.EMBEDDINGS, Endpoint.SCORE, Endpoint.RERANK}

    *ours, chatted = answers.ours
    for (endpoint, body, expected), our, (status, theirs) in zip(
        SAME_POOLING, ours, answers.theirs[:-1], strict=True
    ):
        case = f"{endpoint} {str(body)[:100]}"
        assert (case, our.status_code, status) == (case, expected, expected), our.body
        assert (case, without_ids(json.loads(our.body))) == (case, without_ids(json.loads(theirs)))
        if status == 200:
            assert our.prompt_tokens == body_of(our)["usage"]["prompt_tokens"] > 0
            assert our.completion_tokens == 0
    assert chatted.status_code == 404
    ranked = ours[[endpoint for endpoint, _, _ in SAME_POOLING].index(Endpoint.RERANK)]
    assert [result["index"] for result in body_of(ranked)["results"]] == [1, 0]


@pytest.mark.parametrize(
    ("source", "engine_args", "words"),
    [
        ("/no/such/folder", {}, "no model at"),
        (str(Path(__file__).parent), {}, "no config.json"),
        ("nobody/nothing", {}, "no folder 'nobody/nothing'"),
        (str(DEMO_MODEL), {"max_modell_len": 5}, "unknown engine argument 'max_modell_len'"),
        (str(DEMO_MODEL), {"max_num_seqs": "many"}, "max-num-seqs"),
        (
            str(DEMO_MODEL),
            {"tool_call_parser": "x", "enable_auto_tool_choice": True},
            "tool_call_parser 'x'",
        ),
        (str(DEMO_MODEL), {"reasoning_parser": "x"}, "reasoning_parser 'x'"),
        (str(DEMO_MODEL), {"enable_auto_tool_choice": True}, "tool-call-parser"),
        (str(DEMO_MODEL), {"enable_log_requests": True}, "cannot be set"),
        (str(DEMO_MODEL), {"max_model_len": 10_000_000}, "max_model_len"),
    ],
)
@pytest.mark.usefixtures("vllm_engine")  # vLLM is imported, and the hub out of reach
def test_what_cannot_be_loaded_is_said_clearly(
    source: str, engine_args: dict[str, Any], words: str
) -> None:
    spec = demo_spec(**engine_args)
    if "max_model_len" not in engine_args:
        spec = demo_spec(**{"max_model_len": 256, **engine_args})
    engine = VllmEngine(type(spec)(**{**_fields(spec), "source": source}))
    with pytest.raises(EngineLoadError, match=re.escape(words)) as caught:
        engine.load()
    assert not caught.value.retriable


def _fields(spec: Any) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__struct_fields__}


def test_an_engine_that_fails_is_dead(vllm_engine: VllmEngine) -> None:
    client = vllm_engine._client
    assert client is not None
    vllm_engine.submit([chat(0, max_tokens=500, ignore_eos=True)])
    vllm_engine.collect(0.1)
    client.receive(CoreFailed("RuntimeError: the device is gone"))
    with pytest.raises(EngineDied, match="RuntimeError: the device is gone"):
        vllm_engine.collect(10.0)
    with pytest.raises(EngineDied):
        vllm_engine.collect(0)
    # Nothing was wrong with the real one: make it fit for other tests again.
    vllm_engine.cancel([0])
    client.failure = None
    run(vllm_engine, chat(1))


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_core_that_cannot_load_says_so_and_ends(method: StartMethod) -> None:
    asked: list[BaseException] = []

    def explain(error: BaseException, started_with: LimitsTried | None) -> EngineLoadError:
        asked.append(error)
        retry = LoadRetry(too_large=started_with)
        return EngineLoadError(f"in words: {type(error).__name__}", retry=retry)

    limits = LimitsTried(EngineLimits(8, 512, None), "a device", "1")
    core = CoreProcess.start(explain, method)
    core.configure(None, limits)
    received = bytearray()
    while data := core.line.recv(RECEIVE_BYTES):
        received += data
    (failure,) = unframed(received)
    assert failure == CoreLoadFailed("in words: AttributeError", False, LoadRetry(too_large=limits))
    assert not asked  # there, not here
    assert core.ended().exit_code == 1
    assert core.pid is None
    core.end()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_core_that_is_never_told_what_to_load_ends(method: StartMethod) -> None:
    core = CoreProcess.start(lambda error, _: EngineLoadError(str(error)), method)
    assert core.pid
    process = psutil.Process(core.pid)
    core.end()
    assert core.pid is None
    assert not process.is_running()


@pytest.mark.long
def test_the_core_of_an_engine_process(tmp_path: Path) -> None:
    """Its stacks are in the log when asked for; its violent death is told as what it was."""
    engine = EngineHost(demo_spec(), log_path=tmp_path / "engine.log")
    engine.load()
    _check_that_nothing_said_is_logged(engine, tmp_path / "engine.log")
    preparing = psutil.Process(engine.pid)
    core = engine_core(preparing.pid)
    assert preparing.nice() > core.nice()  # where it steps, nobody who prepares is in its way
    engine.submit([chat(0, max_tokens=1900, ignore_eos=True)])
    engine.collect(0.5)
    engine._dump_stacks()
    stacks = (tmp_path / "engine.log").read_text()
    assert "vllm_core.py" in stacks  # the core's, stepping
    assert "selectors.py" in stacks or "child.py" in stacks  # its parent's, waiting
    core.kill()
    with pytest.raises(EngineDied, match="killed by SIGKILL") as caught:
        engine.collect(20.0)
    assert caught.value.exit_code == -signal.SIGKILL
    engine.close()


def _check_that_nothing_said_is_logged(engine: EngineHost, log: Path) -> None:
    """Whatever vLLM makes of a request: what was asked and answered stays out of its log."""
    secret = "Zanzibar-4711"
    asked = [{"role": "user", "content": f"Say {secret}."}]
    bodies: list[dict[str, Any]] = [
        {"messages": asked, "max_tokens": 4},
        {"messages": [{"role": "user", "content": f"{secret} " * 3000}]},
        {"messages": [{"role": secret, "content": secret}], "max_tokens": 4},
        {"messages": [{"role": "user", "content": [{"type": secret, "text": secret}]}]},
        {"messages": asked, "temperature": secret},
        {"messages": asked, "stop": [secret, ""], "max_tokens": 4},
        {"messages": asked, "max_tokens": 4, "chat_template": "{{ raise_exception(messages) }}"},
        {"messages": asked, "max_tokens": 4, "chat_template": "{{ messages | no_such_filter }}"},
        {"messages": asked, "max_tokens": 4, "structured_outputs": {"regex": f"({secret}"}},
        {"messages": asked, "max_tokens": 4, "response_format": {"type": secret}},
        {"messages": asked, "max_tokens": 4, "tools": [{"type": "function", "function": secret}]},
        {"messages": asked, "max_tokens": 4, "logit_bias": {secret: 1}},
    ]
    outcomes = run(engine, *(request(n, CHAT, **body) for n, body in enumerate(bodies)))
    assert {outcome.status_code for outcome in outcomes} >= {200, 400}
    assert secret not in log.read_text()
