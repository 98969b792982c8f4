"""What every engine must do, whatever computes the answers: `engine/base.py`, as tests.

A test module inherits `EngineConformance` and gives it an `engine` fixture: loaded, idle, able to
chat; it may be shared between tests. `EngineLifetime` needs a `make_engine` fixture as well: a
function that returns another engine, not loaded yet.

    class TestSimEngine(EngineConformance, EngineLifetime):
        @pytest.fixture
        def engine(self) -> Iterator[Engine]: ...
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest

from batch_app.engine.base import Engine, EngineRequest, EngineStats, Outcome

CHAT = "/v1/chat/completions"
DEADLINE_S = 120.0


def chat(number: int, content: str = "What is 27 + 58?", **fields: Any) -> EngineRequest:
    """A chat request of one message; `fields` join or replace those of its body."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
    return EngineRequest(number, CHAT, json.dumps(body).encode())


def collect_all(
    engine: Engine, numbers: Collection[int], *, deadline_s: float = DEADLINE_S
) -> dict[int, Outcome]:
    """Collect until each of `numbers` has its outcome. Fails on a second one, or a stranger's."""
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + deadline_s
    try:
        while len(outcomes) < len(numbers):
            told = f"{len(outcomes)} of {len(numbers)} in {deadline_s} s"
            assert time.monotonic() < deadline, told
            for outcome in engine.collect(1.0):
                assert outcome.number in numbers, f"nobody asked for {outcome.number}"
                assert outcome.number not in outcomes, f"{outcome.number} was answered twice"
                outcomes[outcome.number] = outcome
    except AssertionError:
        engine.cancel(numbers)  # the engine is shared: the next test doesn't get their answers
        raise
    return outcomes


def run(engine: Engine, *requests: EngineRequest) -> list[Outcome]:
    """Submit and collect; the outcomes in the order of the requests."""
    engine.submit(requests)
    outcomes = collect_all(engine, [request.number for request in requests])
    return [outcomes[request.number] for request in requests]


def error_of(outcome: Outcome) -> dict[str, Any]:
    """The error of a body in OpenAI's shape."""
    error: dict[str, Any] = json.loads(outcome.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] == outcome.status_code
    return error


class EngineConformance:
    """Behaviours of a loaded engine. Each test leaves it idle."""

    _numbers = itertools.count(1_000_000)

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        raise NotImplementedError

    def slow_request(self, number: int) -> EngineRequest:
        """One that runs for at least a few tenths of a second. Override where this one doesn't."""
        return chat(number, max_tokens=400, ignore_eos=True)

    def fresh(self, count: int) -> list[int]:
        return list(itertools.islice(self._numbers, count))

    def test_each_request_has_one_outcome_under_its_number(self, engine: Engine) -> None:
        numbers = self.fresh(100)
        engine.submit([chat(number) for number in numbers])
        outcomes = collect_all(engine, numbers)
        assert set(outcomes) == set(numbers)
        assert {outcome.status_code for outcome in outcomes.values()} == {200}
        assert engine.collect(0.1) == []

    def test_an_outcome_repeats_the_token_counts_of_its_body(self, engine: Engine) -> None:
        (outcome,) = run(engine, chat(*self.fresh(1)))
        body = json.loads(outcome.body)
        assert body["object"] == "chat.completion"
        assert isinstance(body["choices"][0]["message"]["content"], str)
        assert outcome.prompt_tokens == body["usage"]["prompt_tokens"] > 0
        assert outcome.completion_tokens == body["usage"]["completion_tokens"] > 0

    def test_the_body_names_the_model_that_ran(self, engine: Engine) -> None:
        named, unnamed = run(
            engine,
            *(chat(n, **f) for n, f in zip(self.fresh(2), ({"model": "x"}, {}), strict=True)),
        )
        assert json.loads(named.body)["model"] == json.loads(unnamed.body)["model"] != "x"

    def test_collect_returns_at_once_when_nothing_is_in_flight(self, engine: Engine) -> None:
        started = time.monotonic()
        assert engine.collect(60.0) == []
        assert time.monotonic() - started < 50

    def test_collect_returns_when_its_time_is_over(self, engine: Engine) -> None:
        (number,) = self.fresh(1)
        engine.submit([self.slow_request(number)])
        started = time.monotonic()
        assert engine.collect(0.001) == []
        assert time.monotonic() - started < 50
        engine.cancel([number])

    def test_requests_may_be_submitted_while_others_run(self, engine: Engine) -> None:
        slow, *quick = self.fresh(6)
        engine.submit([self.slow_request(slow)])
        engine.collect(0.001)
        engine.submit([chat(number) for number in quick])
        outcomes = collect_all(engine, [slow, *quick])
        assert {outcome.status_code for outcome in outcomes.values()} == {200}

    @pytest.mark.parametrize(
        ("endpoint", "body", "statuses"),
        [
            (CHAT, b"{not json", {400}),
            (CHAT, b"{}", {400, 422}),
            (CHAT, b'{"messages": 5}', {400, 422}),
            (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "stream": true}', {400}),
            ("/v1/no-such-endpoint", b"{}", {400, 404}),
        ],
    )
    def test_a_refused_request_harms_no_other(
        self, engine: Engine, endpoint: str, body: bytes, statuses: Collection[int]
    ) -> None:
        first, bad, last = self.fresh(3)
        before, refused, after = run(
            engine, chat(first), EngineRequest(bad, endpoint, body), chat(last)
        )
        assert (before.status_code, after.status_code) == (200, 200)
        assert refused.status_code in statuses
        error_of(refused)

    def test_cancelled_requests_have_no_outcome(self, engine: Engine) -> None:
        gone, kept = self.fresh(20), self.fresh(5)
        engine.submit([self.slow_request(number) for number in gone])
        engine.submit([chat(number) for number in kept])
        engine.collect(0.001)
        engine.cancel(gone)
        collect_all(engine, kept)  # fails on an outcome of those that are gone
        assert engine.collect(0.2) == []

    def test_cancelling_what_is_not_there_changes_nothing(self, engine: Engine) -> None:
        engine.cancel(self.fresh(2))
        (number,) = self.fresh(1)
        run(engine, chat(number))
        engine.cancel([number])
        engine.cancel([])
        assert engine.collect(0.1) == []

    def test_a_cancelled_number_may_come_again(self, engine: Engine) -> None:
        (number,) = self.fresh(1)
        engine.submit([self.slow_request(number)])
        engine.collect(0.001)
        engine.cancel([number])
        (outcome,) = run(engine, chat(number))
        assert outcome.status_code == 200
        assert outcome.completion_tokens <= 8
        assert engine.collect(0.1) == []

    def test_the_stats_count_tokens_and_come_to_rest(self, engine: Engine) -> None:
        before = engine.stats()
        outcomes = run(engine, *(chat(number) for number in self.fresh(10)))

        def counted(stats: EngineStats) -> bool:
            prompt = stats.prompt_tokens_total - before.prompt_tokens_total
            generated = stats.generation_tokens_total - before.generation_tokens_total
            return prompt >= sum(o.prompt_tokens for o in outcomes) and generated >= sum(
                o.completion_tokens for o in outcomes
            )

        deadline = time.monotonic() + DEADLINE_S  # a process in between reports them now and then
        while not (counted(stats := engine.stats()) and stats.num_running == 0):
            assert time.monotonic() < deadline, stats
            engine.collect(0.05)
        assert stats.num_waiting == 0


class EngineLifetime:
    """From `load` to `close`. Loads engines of its own."""

    @pytest.fixture
    def make_engine(self) -> Callable[[], Engine]:
        raise NotImplementedError

    def test_info_says_what_was_loaded(self, make_engine: Callable[[], Engine]) -> None:
        engine = make_engine()
        try:
            info = engine.load()
            assert info.engine
            assert info.engine_version
            assert info.device
            assert info.load_s >= 0
            assert info.max_num_seqs > 0
            for limit in (info.max_model_len, info.max_num_batched_tokens):
                assert limit is None or limit > 0
            assert CHAT in info.endpoints
        finally:
            engine.close()

    def test_what_it_is_told_ahead_is_not_submitted(
        self, make_engine: Callable[[], Engine]
    ) -> None:
        engine = make_engine()
        try:
            engine.load([chat(0), chat(1, "What is 1 + 1?")])
            assert engine.collect(0.1) == []
            other, told = run(engine, chat(0, "What is 2 + 2?"), chat(1, "What is 1 + 1?"))
            assert (other.status_code, told.status_code) == (200, 200)
            assert engine.collect(0) == []
        finally:
            engine.close()

    def test_close_may_come_early_twice_and_under_way(
        self, make_engine: Callable[[], Engine]
    ) -> None:
        make_engine().close()
        engine = make_engine()
        engine.load()
        engine.submit([chat(number) for number in range(5)])
        engine.collect(0.001)
        engine.close()
        engine.close()
