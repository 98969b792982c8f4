"""The engine that is a server, held to what every engine does, over real HTTP; and its own part:
what comes again, what becomes an error line, and when the server is given up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from batch_app.core import Endpoint
from batch_app.engine.base import Engine, EngineRequest, ModelSpec, Outcome
from batch_app.engine.openai import OpenAIEngine
from batch_app.engine.server_bodies import SHORTEST
from batch_app.errors import EngineUnavailable
from contract.engine_conformance import (
    CHAT,
    EngineConformance,
    EngineLifetime,
    chat,
    collect_all,
    error_of,
    run,
)
from support.model_server import Broken, Fault, ModelServerStub, always, error, for_word, serving
from support.waiting import wait_for

#: So short that a test doesn't wait.
QUICK = {"backoff_s": 0.01, "max_backoff_s": 0.05}


def spec(server: ModelServerStub, **engine_args: Any) -> ModelSpec:
    args = {"base_url": server.base_url, **QUICK, **engine_args}
    return ModelSpec(name="ours", engine="openai", source="served-name", engine_args=args)


@pytest.fixture
def server() -> Iterator[ModelServerStub]:
    with serving() as server:
        yield server


@contextmanager
def loaded(server: ModelServerStub, api_key: str = "", **engine_args: Any) -> Iterator[Engine]:
    engine = OpenAIEngine(spec(server, **engine_args), api_key)
    engine.load()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ModelServerStub]:
    with serving() as server:
        yield server


class TestOpenAIEngine(EngineConformance, EngineLifetime):
    @pytest.fixture
    def engine(self, shared_server: ModelServerStub) -> Iterator[Engine]:
        with loaded(shared_server) as engine:
            yield engine

    @pytest.fixture
    def make_engine(self, shared_server: ModelServerStub) -> Callable[[], Engine]:
        return lambda: OpenAIEngine(spec(shared_server))


# -- what is sent, and what comes back -------------------------------------------------------------


def test_a_body_goes_out_and_comes_back_as_it_is_but_for_the_models_name(
    server: ModelServerStub,
) -> None:
    server.indent = 2  # a line of the results must stay one line
    body = '{"model":"ours", "messages":[{"role":"user","content":"é\\n \\u00e9"}],"top_p":1.50}'
    with loaded(server, extra_body={"priority": 5}) as engine:
        (outcome,) = run(engine, EngineRequest(1, CHAT, body.encode()))
    (sent,) = server.bodies
    assert sent == json.loads(body) | {"model": "served-name", "priority": 5}
    assert b"\n" not in outcome.body
    answer = json.loads(outcome.body)
    assert answer["model"] == "ours"
    assert list(answer) == ["id", "created", "model", "object", "choices", "usage"]
    assert answer["choices"][0]["message"]["content"] == "é é"
    assert (outcome.prompt_tokens, outcome.completion_tokens, outcome.cached_tokens) == (2, 2, 1)
    assert "authorization" not in server.headers[0]


def test_the_name_of_another_model_that_answered_stays(server: ModelServerStub) -> None:
    answer = (
        b'{"model":"served-name-2026-01-01","big":123456789012345678901234567890,'
        b'"choices":[{"text":"x"}]}'
    )
    server.fault = always(lambda: Response(answer, media_type="application/json"))
    with loaded(server) as engine:
        (outcome,) = run(engine, chat(1))
    assert outcome.body == answer
    assert (outcome.status_code, outcome.prompt_tokens) == (200, 0)


def test_the_key_is_sent_and_what_the_server_says_of_itself_is_told(
    server: ModelServerStub,
) -> None:
    server.api_key = "sk-very-secret"
    engine = OpenAIEngine(spec(server, max_concurrency=7), "sk-very-secret")
    info = engine.load()
    run(engine, chat(1))
    engine.close()
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert (info.engine, info.engine_version) == ("openai", "stub 1.2.3")
    assert (info.max_model_len, info.max_num_seqs, info.max_num_batched_tokens) == (4096, 7, None)


# -- what comes again ------------------------------------------------------------------------------


async def hang(_: Request) -> Response:
    await asyncio.sleep(3600)
    return Response()


def not_json() -> Response:
    return Response("<h1>Hello</h1>", media_type="text/html")


@pytest.mark.parametrize(
    "fault",
    [
        *(always(lambda status=status: error(status)) for status in (408, 409, 429, 500, 502, 503)),
        always(lambda: error(429, retry_after="0.01")),
        always(Broken),
        always(not_json),
    ],
)
def test_what_fails_in_passing_comes_again(server: ModelServerStub, fault: Fault) -> None:
    server.faults = [fault, fault]
    with loaded(server) as engine:
        outcomes = run(engine, *(chat(number, f"say {number}") for number in range(5)))
    said = [json.loads(one.body)["choices"][0]["message"]["content"] for one in outcomes]
    assert said == [f"say {number}" for number in range(5)]
    assert len(server.bodies) == 7


def test_a_request_that_hangs_is_broken_off_and_comes_again(server: ModelServerStub) -> None:
    server.faults = [hang]
    with loaded(server, timeout_s=2.0) as engine:
        outcomes = run(engine, chat(1), chat(2))
    assert [one.status_code for one in outcomes] == [200, 200]


def test_the_server_is_left_alone_as_long_as_it_asks_for(server: ModelServerStub) -> None:
    server.faults = [always(lambda: error(429, retry_after="1"))]
    with loaded(server, min_concurrency=1, max_concurrency=1) as engine:
        started = time.monotonic()
        outcomes = run(engine, *(chat(number) for number in range(3)))
        took_s = time.monotonic() - started
    assert [one.status_code for one in outcomes] == [200] * 3
    assert took_s >= 1.0
    assert len(server.bodies) == 4


def test_a_server_that_refuses_more_gets_fewer_at_a_time(server: ModelServerStub) -> None:
    server.most = 3
    with loaded(server) as engine:
        slow = [chat(number, max_tokens=80, ignore_eos=True) for number in range(12)]
        outcomes = run(engine, *slow)
        assert engine._limit.window < 8  # type: ignore[attr-defined]
    assert {one.status_code for one in outcomes} == {200}


def test_no_more_are_sent_at_a_time_than_is_allowed(server: ModelServerStub) -> None:
    with loaded(server, max_concurrency=4) as engine:
        run(engine, *(chat(number, max_tokens=40, ignore_eos=True) for number in range(12)))
    assert 1 < server.most_at_once <= 4


# -- what becomes an error line --------------------------------------------------------------------


def failed(outcomes: list[Outcome]) -> Outcome:
    """The one outcome that is no success."""
    (one,) = (outcome for outcome in outcomes if outcome.status_code != 200)
    return one


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422, 401])
def test_what_the_server_refuses_is_said_in_its_words_and_once(
    server: ModelServerStub, status: int
) -> None:
    server.fault = for_word("poison", lambda: error(status, f"Status {status}."))
    with loaded(server) as engine:
        outcome = failed(run(engine, chat(1), chat(2, "poison"), chat(3)))
    assert error_of(outcome)["message"] == f"Status {status}."
    assert outcome.number == 2
    assert server.prompts().count("poison") == 1


@pytest.mark.parametrize("num_others", [0, 20])
def test_a_request_that_always_fails_gets_its_line_when_the_server_works_otherwise(
    server: ModelServerStub, num_others: int
) -> None:
    """Alone, too: then a short request of our own shows that it works."""
    server.fault = for_word("poison", lambda: error(500, "Status 500."))
    with loaded(server, max_retries=2) as engine:
        others = [chat(number) for number in range(num_others)]
        outcome = failed(run(engine, chat(1000, "poison"), *others))
    assert error_of(outcome)["message"] == "Status 500."
    assert server.prompts().count("poison") == 3


def test_an_error_that_is_no_json_is_put_into_some(server: ModelServerStub) -> None:
    server.fault = always(lambda: Response("<h1>Too large</h1>", 413))
    with loaded(server) as engine:
        (outcome,) = run(engine, chat(1))
    assert outcome.status_code == error_of(outcome)["code"] == 413
    assert "Too large" not in error_of(outcome)["message"]


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Response("{}" + " " * 5000), "response_too_large"),
        (not_json, "invalid_response"),
        (Broken, "connection_error"),
    ],
)
def test_without_a_usable_response_there_is_an_error_line(
    server: ModelServerStub, make: Callable[[], Response], code: str
) -> None:
    server.fault = for_word("poison", make)
    with loaded(server, max_retries=1, max_response_bytes=4096) as engine:
        outcome = failed(run(engine, chat(1), chat(2, "poison"), chat(3)))
    assert outcome.error_code == code
    assert "Hello" not in outcome.body.decode()


# -- answers of status 200 that are none -----------------------------------------------------------


def in_a_200(content: object, **headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps(content), headers=named, media_type="application/json")


@pytest.mark.parametrize("code", [429, "503", 500, 408])
def test_an_error_in_a_200_comes_again_if_its_status_would(
    server: ModelServerStub, code: object
) -> None:
    answer = {"error": {"message": "Not now.", "code": code}}
    server.faults = [always(lambda: in_a_200(answer))] * 2
    with loaded(server) as engine:
        outcomes = run(engine, *(chat(number, f"say {number}") for number in range(5)))
    assert [one.status_code for one in outcomes] == [200] * 5
    assert len(server.bodies) == 7


def test_the_pause_that_an_error_in_a_200_asks_for_is_kept(server: ModelServerStub) -> None:
    answer = {"error": {"message": "Not now.", "code": 429}}
    server.faults = [always(lambda: in_a_200(answer, retry_after="1"))]
    with loaded(server, min_concurrency=1, max_concurrency=1) as engine:
        started = time.monotonic()
        outcomes = run(engine, *(chat(number) for number in range(3)))
        took_s = time.monotonic() - started
    assert [one.status_code for one in outcomes] == [200] * 3
    assert took_s >= 1.0


@pytest.mark.parametrize("endpoint", sorted(Endpoint))
def test_a_server_that_answers_everything_with_an_error_refuses_each_request(
    server: ModelServerStub, endpoint: str
) -> None:
    """As one that doesn't know the endpoint: no batch waits for that to change."""
    answer = {"error": "Unexpected endpoint or method."}
    server.fault = always(lambda: in_a_200(answer))
    body = json.dumps(SHORTEST[endpoint]).encode()
    with loaded(server) as engine:
        outcomes = run(engine, *(EngineRequest(number, endpoint, body) for number in range(3)))
    assert [one.status_code for one in outcomes] == [400] * 3
    assert json.loads(outcomes[0].body) == answer
    assert len(server.bodies) == 3


@pytest.mark.parametrize("endpoint", sorted(Endpoint))
def test_every_endpoint_has_good_answers(server: ModelServerStub, endpoint: str) -> None:
    with loaded(server) as engine:
        (outcome,) = run(
            engine, EngineRequest(1, endpoint, json.dumps(SHORTEST[endpoint]).encode())
        )
    assert outcome.status_code == 200


# -- when the server is given up -------------------------------------------------------------------


def until_given_up(engine: Engine, numbers: Collection[int]) -> EngineUnavailable:
    with pytest.raises(EngineUnavailable) as caught:
        collect_all(engine, numbers)
    return caught.value


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (always(lambda: error(500)), "answers 500, also to the shortest request"),
        (always(lambda: RedirectResponse("http://127.0.0.1:9/elsewhere")), "answers 307"),
        (always(Broken), "connection to the server broke"),
        (always(not_json), "no JSON"),
    ],
)
def test_a_server_that_fails_everything_fails_no_request(
    server: ModelServerStub, fault: Fault, words: str
) -> None:
    with loaded(server, max_retries=1) as engine:
        run(engine, chat(0))
        server.fault = fault
        engine.submit([chat(number) for number in range(1, 50)])
        given_up = until_given_up(engine, range(1, 50))
        assert words in given_up.message
        assert given_up.model == "ours"
        assert str(server.port) not in given_up.message
        with pytest.raises(EngineUnavailable):
            engine.collect(0.1)


def test_an_answer_to_what_was_sent_before_is_no_sign_that_a_server_works(
    server: ModelServerStub,
) -> None:
    """As when a server goes down: what it has begun it still answers."""
    may_answer, num_failed = asyncio.Event(), 0

    async def fault(request: Request) -> Response | None:
        nonlocal num_failed
        if b"early" in await request.body():
            await may_answer.wait()
            return None
        num_failed += 1
        if num_failed == 3:  # the last attempt of the other one
            may_answer.set()
            await asyncio.sleep(0.5)
        return error(500)

    server.fault = fault
    with loaded(server, max_retries=2) as engine:
        engine.submit([chat(1, content="early")])
        assert engine.collect(0.2) == []
        engine.submit([chat(2)])
        assert "answers 500" in until_given_up(engine, [1, 2]).message


def test_a_server_that_refuses_everything_is_given_up_after_a_while(
    server: ModelServerStub,
) -> None:
    server.fault = always(lambda: error(429))
    with loaded(server, patience_s=1.0) as engine:
        engine.submit([chat(number) for number in range(20)])
        assert "answers 429" in until_given_up(engine, range(20)).message


def test_one_that_wants_a_long_pause_gets_it(server: ModelServerStub) -> None:
    server.fault = always(lambda: error(503, retry_after="900"))
    with loaded(server) as engine:
        engine.submit([chat(1)])
        assert 800 < until_given_up(engine, [1]).retry_after_s <= 900


def test_a_key_that_is_taken_away_fails_no_request(server: ModelServerStub) -> None:
    with loaded(server, "old") as engine:
        run(engine, chat(0))
        server.api_key = "new"
        engine.submit([chat(number) for number in range(1, 20)])
        assert "refuses the API key (401)" in until_given_up(engine, range(1, 20)).message


def test_nobody_at_the_address(server: ModelServerStub) -> None:
    nobody = ModelServerStub()
    try:
        with pytest.raises(EngineUnavailable, match="no connection to the server"):
            OpenAIEngine(spec(nobody)).load()
    finally:
        nobody.stop()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (always(lambda: error(503)), "answers 503"),
        (always(lambda: RedirectResponse("/elsewhere")), "redirects are not followed"),
        (always(lambda: Response('{"data": 5}')), "no list of models"),
        (always(lambda: Response('{"data": [{"id": "other"}]}')), "it has: 'other'"),
        (always(lambda: Response("[" * 5_000_000)), "no list of models"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_to_be(
    server: ModelServerStub, fault: Fault, words: str
) -> None:
    server.look_fault = fault
    with pytest.raises(EngineUnavailable, match=words):
        OpenAIEngine(spec(server)).load()


def test_a_server_without_a_list_of_models_is_believed(server: ModelServerStub) -> None:
    server.look_fault = always(lambda: error(404))
    with loaded(server) as engine:
        assert run(engine, chat(1))[0].status_code == 200


# -- cancelling ------------------------------------------------------------------------------------


def test_cancelling_closes_the_connection(server: ModelServerStub) -> None:
    with loaded(server) as engine:
        slow = [chat(number, max_tokens=100_000, ignore_eos=True) for number in range(5)]
        engine.submit(slow)
        deadline = time.monotonic() + 60
        while len(server.bodies) < 5:
            assert time.monotonic() < deadline
            engine.collect(0.01)
        engine.cancel(range(5))
        wait_for(lambda: server.num_broken_off == 5, timeout_s=60, what="they are gone")
        assert engine.stats().num_running == engine.stats().num_waiting == 0
