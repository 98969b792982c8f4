"""No request gets the answer to another one, whatever a server writes behind its answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from batch_app.engine.base import EngineRequest, ModelSpec, Outcome
from batch_app.engine.openai import OpenAIEngine
from contract.engine_conformance import chat, run
from support.certificates import make_certificate, server_context
from support.raw_server import Answer, RawRequest, RawServer, http_answer, raw_serving


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, certificate: Path) -> ssl.SSLContext | None:
    return server_context(certificate) if request.param == "https" else None


@contextmanager
def engine_for(server: RawServer, certificate: Path, **engine_args: Any) -> Iterator[OpenAIEngine]:
    args = {"base_url": server.base_url, "backoff_s": 0.01, "max_backoff_s": 0.05, **engine_args}
    if server.tls is not None:
        args["ca_file"] = str(certificate)
    engine = OpenAIEngine(
        ModelSpec(name="ours", engine="openai", source="served-name", engine_args=args)
    )
    engine.load()
    try:
        yield engine
    finally:
        engine.close()


def at_most(concurrency: int) -> dict[str, int]:
    return {"min_concurrency": concurrency, "max_concurrency": concurrency}


def saying(count: int, prefix: str = "say") -> list[EngineRequest]:
    return [chat(number, f"{prefix} {number}") for number in range(count)]


def text_of(outcome: Outcome) -> str:
    assert outcome.status_code == 200, outcome
    return str(json.loads(outcome.body)["choices"][0]["message"]["content"])


def assert_own_answers(outcomes: list[Outcome], prefix: str = "say") -> None:
    assert [text_of(one) for one in outcomes] == [f"{prefix} {one.number}" for one in outcomes]


# -- what servers write behind an answer -----------------------------------------------------------


async def twice_at_once(request: RawRequest) -> None:
    await request.write(http_answer(request.said()) * 2)


async def twice_in_two_writes(request: RawRequest) -> None:
    await request.write(http_answer(request.said()))
    await asyncio.sleep(0.001)
    await request.write(http_answer(request.said()))


async def twice_a_moment_later(request: RawRequest) -> None:
    await request.write(http_answer(request.said()))
    await asyncio.sleep(0.02)
    await request.write(http_answer(request.said()))


async def more_than_the_content_length(request: RawRequest) -> None:
    body = request.said()
    await request.write(http_answer(body + b"\r\n<!-- cached -->", content_length=str(len(body))))


async def more_behind_the_last_chunk(request: RawRequest) -> None:
    body = request.said()
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    await request.write(head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + http_answer(body))


@pytest.mark.parametrize("concurrency", [1, 64])
@pytest.mark.parametrize(
    "answer",
    [
        twice_at_once,
        twice_in_two_writes,
        twice_a_moment_later,
        more_than_the_content_length,
        more_behind_the_last_chunk,
    ],
)
def test_bytes_behind_an_answer_never_reach_another_request(
    certificate: Path, tls: ssl.SSLContext | None, answer: Answer, concurrency: int
) -> None:
    num = 20 if concurrency == 1 else 200
    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(concurrency)) as engine,
    ):
        assert_own_answers(run(engine, *saying(num)))
        assert_own_answers(run(engine, *saying(num, "again")), "again")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_the_body_of_an_answer_that_has_none_reaches_no_other_request(
    certificate: Path, tls: ssl.SSLContext | None, status: str
) -> None:
    async def answer(request: RawRequest) -> None:
        if request.prompt == "say 3":
            await request.write(http_answer(request.said(), status))
        else:
            await request.write(http_answer(request.said()))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, max_retries=0, **at_most(1)) as engine,
    ):
        outcomes = run(engine, *saying(10))
    assert outcomes.pop(3).status_code != 200
    assert_own_answers(outcomes)


def test_what_a_server_says_while_nobody_asks_is_no_answer(
    certificate: Path, tls: ssl.SSLContext | None
) -> None:
    num_left = 2

    async def answer(request: RawRequest) -> None:
        nonlocal num_left
        await request.write(http_answer(request.said()))
        if num_left:
            num_left -= 1
            await asyncio.sleep(0.3)  # the connection may be reused by now
            await request.write(http_answer(request.said("of nobody")))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(1)) as engine,
    ):
        assert_own_answers(run(engine, *saying(1)))
        assert engine.collect(0.0) == []
        threading.Event().wait(0.5)  # nobody looks at the connections meanwhile
        assert_own_answers(run(engine, *saying(6)))


def test_an_interim_answer_is_passed_over(certificate: Path, tls: ssl.SSLContext | None) -> None:
    async def answer(request: RawRequest) -> None:
        await request.write(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n")
        await request.write(http_answer(request.said()))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(2)) as engine,
    ):
        assert_own_answers(run(engine, *saying(20)))


# -- what comes after the next request was sent ----------------------------------------------------


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("concurrency", [1, 64])
def test_a_late_answer_is_known_by_the_id_of_its_request(
    certificate: Path, tls: ssl.SSLContext | None, where: str, concurrency: int
) -> None:
    """Each connection is one answer late from its second request on: only ids can tell."""
    late: dict[int, bytes] = {}  # by connection

    async def answer(request: RawRequest) -> None:
        request_id = request.headers.get("x-request-id", "")
        if where == "header":
            whole = http_answer(request.said(), x_request_id=request_id)
        else:
            whole = http_answer(request.said(id=f"chatcmpl-{request_id}"))
        before = late.get(id(request.writer), whole) if request.number > 1 else whole
        late[id(request.writer)] = whole
        await request.write(before)

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(concurrency)) as engine,
    ):
        assert_own_answers(run(engine, *saying(concurrency)))
        threading.Event().wait(0.2)  # they have been silent for long enough to be reused
        assert_own_answers(run(engine, *saying(concurrency + 10, "again")), "again")


def test_an_answer_that_may_be_a_late_one_is_not_believed(
    certificate: Path, tls: ssl.SSLContext | None
) -> None:
    """The second answer to the first request comes with the first to the second."""

    async def answer(request: RawRequest) -> None:
        late = http_answer(request.said("say 0")) if request.number == 2 else b""
        await request.write(late + http_answer(request.said()))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(1)) as engine,
    ):
        assert_own_answers(run(engine, *saying(1)))
        threading.Event().wait(0.2)
        assert_own_answers(run(engine, *saying(5, "again")), "again")


def test_a_connection_for_each_request_can_be_asked_for(
    certificate: Path, tls: ssl.SSLContext | None
) -> None:
    async def answer(request: RawRequest) -> None:
        assert request.headers["connection"] == "close"
        await request.write(http_answer(request.said()))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, reuse_connections=False) as engine,
    ):
        assert_own_answers(run(engine, *saying(30)))
        assert server.num_connections >= server.num_requests == 30


def test_connections_to_a_server_without_a_defect_are_reused(
    certificate: Path, tls: ssl.SSLContext | None
) -> None:
    async def answer(request: RawRequest) -> None:
        await asyncio.sleep(0.02)
        await request.write(http_answer(request.said()))

    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **at_most(1)) as engine,
    ):
        assert_own_answers(run(engine, *saying(60)))
        assert server.num_connections < 40


# -- answers that are no proper HTTP, or have no end -----------------------------------------------


async def too_many_headers(request: RawRequest) -> None:
    await request.write(b"HTTP/1.1 200 OK\r\n" + b"x-more: and more\r\n" * 20_000 + b"\r\n")


async def no_http(request: RawRequest) -> None:
    await request.write(b"220 mail.example ESMTP\r\n\r\n")


async def compressed(request: RawRequest) -> None:
    body = gzip.compress(request.said())
    await request.write(http_answer(body, content_encoding="gzip"))


async def a_redirect(request: RawRequest) -> None:
    await request.write(http_answer(b"", "307 Temporary Redirect", location="/elsewhere"))


async def a_body_without_end(request: RawRequest) -> None:
    await request.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await request.write(b"x" * 65536)


async def a_byte_now_and_then(request: RawRequest) -> None:
    await request.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        await request.write(b"x")
        await asyncio.sleep(0.05)


async def interim_answers_without_end(request: RawRequest) -> None:
    while True:
        await request.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        await asyncio.sleep(0.01)


async def two_lengths(request: RawRequest) -> None:
    body = request.said()
    await request.write(
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )


async def a_cut_chunk(request: RawRequest) -> None:
    await request.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffff\r\n{")
    request.writer.close()


@pytest.mark.parametrize(
    ("odd", "code"),
    [
        (too_many_headers, "connection_error"),
        (no_http, "connection_error"),
        (compressed, "invalid_response"),
        (a_redirect, ""),
        (a_body_without_end, "response_too_large"),
        (a_byte_now_and_then, "request_timeout"),
        (interim_answers_without_end, "request_timeout"),
        (two_lengths, "connection_error"),
        (a_cut_chunk, "connection_error"),
    ],
)
def test_an_answer_that_cannot_be_read_harms_no_other(
    certificate: Path, tls: ssl.SSLContext | None, odd: Answer, code: str
) -> None:
    async def answer(request: RawRequest) -> None:
        if request.prompt == "say 3":
            await odd(request)
        else:
            await request.write(http_answer(request.said()))

    limits = {"timeout_s": 5.0, "max_retries": 0, "max_response_bytes": 1 << 20}
    with (
        raw_serving(answer, tls) as server,
        engine_for(server, certificate, **limits, **at_most(4)) as engine,
    ):
        outcomes = run(engine, *saying(20))
    failed = outcomes.pop(3)
    assert failed.error_code == code
    assert failed.status_code == 500 if code else failed.status_code == 307
    assert_own_answers(outcomes)
