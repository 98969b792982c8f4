"""The engine that is a server: requests go to any server that speaks OpenAI's API.

Requests wait in a queue. As many as `Concurrency` allows are on their way at a time, each an HTTP
request of its own; what fails in passing comes again, by the rules of `retries`. A request gets an
error line only where the server works but for this one: that is shown by another answer since, or
by a short request of our own. Otherwise the whole engine ends with `EngineUnavailable`, the
requests in flight have no outcome, and the batch waits until the server works again.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import orjson

from batch_app.core import Endpoint
from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.concurrency import Concurrency
from batch_app.engine.retries import BUSY, is_worth_another_try, pause_s
from batch_app.engine.server_answers import understood
from batch_app.engine.server_bodies import SHORTEST, body_to_send, refusal, with_our_name
from batch_app.engine.server_client import Answer, NoAnswer, ServerClient
from batch_app.engine.usage import read_answer
from batch_app.errors import (
    ConfigError,
    EngineDied,
    EngineError,
    EngineLoadError,
    EngineUnavailable,
)
from batch_app.model_server import ModelServer

#: Whatever the server runs on: this machine says nothing about it.
DEVICE = "remote server"
#: Answers that may mean the server as a whole: it lost our key, or the model.
_OF_THE_SERVER = frozenset({401, 404})


@dataclass(slots=True, eq=False)
class _Pending:
    """A request without an outcome. `num_tries`: attempts that failed and weren't just refused."""

    number: int
    endpoint: str
    body: bytes
    num_tries: int = 0
    num_refusals: int = 0


class OpenAIEngine(Engine):
    """A server's model. The thread that calls `load` is the one to call everything else."""

    def __init__(self, spec: ModelSpec, api_key: str = "") -> None:
        self._spec = spec
        self._api_key = api_key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: ServerClient | None = None
        self._queue: deque[_Pending] = deque()
        self._later: list[tuple[float, int, _Pending]] = []  # a heap by the time they are due
        self._order = itertools.count()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._unproven: list[tuple[_Pending, Outcome]] = []  # outcomes, if the server works
        self._proving: asyncio.Task[None] | None = None
        self._done: list[Outcome] = []
        self._failure: EngineUnavailable | None = None
        self._held_until = 0.0
        self._worked_at = 0.0  # when the newest request was sent that showed that the server works
        self._looked_at = 0.0  # when a look at the server last began that found all well
        self._trouble_since: float | None = None
        self._trouble = ""
        self._wakeup = asyncio.Event()
        self._counts = {"prompt": 0, "generation": 0, "queries": 0, "hits": 0}

    # -- loading -------------------------------------------------------------------------------

    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
        """As `Engine.load`.

        Raises also:
            EngineUnavailable: the server doesn't answer, refuses the key, or hasn't the model.
        """
        started = time.monotonic()
        try:
            server = self._server = ModelServer.of(self._spec.engine_args)
        except ConfigError as error:
            raise EngineLoadError(f"model {self._spec.name!r}: {error.message}") from error
        self._limit = Concurrency(server.min_concurrency, server.max_concurrency)
        self._loop = asyncio.new_event_loop()
        try:
            self._client = ServerClient(server, self._spec.name, self._spec.source, self._api_key)
            facts = self._loop.run_until_complete(self._client.look())
            version = self._loop.run_until_complete(self._client.version())
        except EngineError:
            self.close()
            raise
        return EngineInfo(
            engine="openai",
            engine_version=" ".join(filter(None, (facts.software, version))) or "unknown",
            model=self._spec.name,
            device=DEVICE,
            device_type="remote",
            load_s=time.monotonic() - started,
            max_model_len=server.max_model_len or facts.max_model_len,
            max_num_seqs=server.max_concurrency,
            max_num_batched_tokens=None,
            endpoints=tuple(endpoint.value for endpoint in Endpoint),
            limits_source="the most that the server is given",
            bounds_requests=True,
        )

    # -- running -------------------------------------------------------------------------------

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            refused = refusal(request)
            if refused is not None:
                self._done.append(refused)
            else:
                body = body_to_send(request.body, self._spec.source, self._server.extra_body)
                self._queue.append(_Pending(request.number, request.endpoint, body))

    def cancel(self, numbers: Collection[int]) -> None:
        gone = frozenset(numbers)
        self._queue = deque(one for one in self._queue if one.number not in gone)
        self._later = [entry for entry in self._later if entry[2].number not in gone]
        heapq.heapify(self._later)
        self._unproven = [entry for entry in self._unproven if entry[0].number not in gone]
        self._done = [outcome for outcome in self._done if outcome.number not in gone]
        tasks = [task for number in gone if (task := self._running.pop(number, None))]
        self._end(tasks, timeout_s=1)

    def collect(self, timeout_s: float) -> list[Outcome]:
        """As `Engine.collect`.

        Raises also:
            EngineUnavailable: the server doesn't work at the moment, as far as can be seen.
        """
        if self._loop is None or self._client is None:
            raise EngineDied("the engine isn't loaded")
        if self._failure is None and self._is_busy():
            self._loop.run_until_complete(self._work(timeout_s))
        if self._failure is not None and not self._done:
            raise self._failure
        done, self._done = self._done, []
        return done

    def stats(self) -> EngineStats:
        waiting = len(self._queue) + len(self._later) + len(self._unproven)
        return EngineStats(
            num_running=len(self._running),
            num_waiting=waiting,
            prompt_tokens_total=self._counts["prompt"],
            generation_tokens_total=self._counts["generation"],
            prefix_cache_queries_total=self._counts["queries"],
            prefix_cache_hits_total=self._counts["hits"],
            at_s=time.monotonic(),
        )

    def close(self) -> None:
        loop, self._loop = self._loop, None
        client, self._client = self._client, None
        self._queue.clear()
        self._later.clear()
        self._unproven.clear()
        self._done.clear()
        tasks = list(self._running.values())
        if self._proving is not None:
            tasks.append(self._proving)
        self._running, self._proving = {}, None
        if loop is None:
            return
        with contextlib.suppress(Exception):
            self._end(tasks, timeout_s=5, loop=loop)
            if client is not None:
                loop.run_until_complete(asyncio.wait_for(client.close(), 5))
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    # -- the way of a request ------------------------------------------------------------------

    def _is_busy(self) -> bool:
        return bool(self._queue or self._later or self._running or self._unproven)

    async def _work(self, timeout_s: float) -> None:
        """Until there is an outcome, the server is given up, or the time is over."""
        deadline = time.monotonic() + timeout_s
        while not self._done and self._is_busy():
            self._send_due()
            now = time.monotonic()
            if self._is_given_up(now) or now >= deadline:
                break
            with contextlib.suppress(TimeoutError):
                until = min(deadline, self._next_due(now))
                await asyncio.wait_for(self._wakeup.wait(), max(until - now, 0.0))
            self._wakeup.clear()
        if self._failure is None:
            self._send_due()  # the places of those that have finished
        await asyncio.sleep(0)  # what was begun gets on its way before the caller takes over

    def _send_due(self) -> None:
        now = time.monotonic()
        if self._failure is not None or self._proving is not None or now < self._held_until:
            return
        if self._is_out_of_patience(now):
            return  # what is on its way has the last word
        for pending in self._due(now):
            assert self._loop is not None
            task = self._loop.create_task(self._try(pending, len(self._running) + 1))
            self._running[pending.number] = task

    def _due(self, now: float) -> Iterator[_Pending]:
        """Those that may be sent now: first what was tried before."""
        while len(self._running) < self._limit.window:
            if self._later and self._later[0][0] <= now:
                yield heapq.heappop(self._later)[2]
            elif self._queue:
                yield self._queue.popleft()
            else:
                return

    def _next_due(self, now: float) -> float:
        """When `_send_due` may have something to do, if nothing happens before."""
        if self._proving is not None or len(self._running) >= self._limit.window:
            return now + 3600.0
        due = now if self._queue else self._later[0][0] if self._later else now + 3600.0
        return max(due, self._held_until, now + 0.001)

    async def _try(self, pending: _Pending, num_in_flight: int) -> None:
        assert self._client is not None
        sent_at = time.monotonic()
        answer = await self._client.post(pending.endpoint, pending.body)
        if self._running.get(pending.number) is not asyncio.current_task():
            return  # cancelled, and perhaps submitted anew
        del self._running[pending.number]
        now = time.monotonic()
        self._settle(pending, answer, sent_at, now, num_in_flight)
        self._wakeup.set()

    def _settle(
        self,
        pending: _Pending,
        answer: Answer | NoAnswer,
        sent_at: float,
        now: float,
        num_in_flight: int,
    ) -> None:
        """Make an outcome of an answer, or see to it that the request comes again."""
        if isinstance(answer, Answer):
            answer = understood(pending.endpoint, answer)
        if isinstance(answer, NoAnswer):
            message = answer.why.encode()
            outcome = Outcome(pending.number, 500, message, error_code=answer.code)
            if answer.is_final:
                self._done.append(outcome)
                return
            if answer.is_slow:
                self._limit.refused(sent_at=sent_at, now=now)
            self._again(pending, outcome, sent_at, now, answer.why)
        elif answer.status in BUSY:
            self._limit.refused(sent_at=sent_at, now=now)
            self._note_trouble(now, f"answers {answer.status}")
            pending.num_refusals += 1
            wait_s = self._pause_s(pending.num_refusals, answer.retry_after_s)
            if answer.retry_after_s:  # the same would be said to all others
                self._held_until = max(self._held_until, now + answer.retry_after_s)
            heapq.heappush(self._later, (now + wait_s, next(self._order), pending))
        elif is_worth_another_try(answer.status):
            outcome = Outcome(pending.number, answer.status, answer.body)
            why = f"It answered {answer.status}."
            self._again(pending, outcome, sent_at, now, why, answer.retry_after_s)
        elif answer.status in _OF_THE_SERVER and self._looked_at < sent_at:
            self._unproven.append((pending, Outcome(pending.number, answer.status, answer.body)))
            self._prove()
        else:
            self._works(sent_at)
            outcome = self._outcome(pending.number, answer)
            tokens = outcome.prompt_tokens + outcome.completion_tokens
            if answer.status == 200:
                self._limit.answered(
                    sent_at=sent_at, now=now, tokens=tokens, num_in_flight=num_in_flight
                )
            self._done.append(outcome)

    def _again(
        self,
        pending: _Pending,
        outcome: Outcome,
        sent_at: float,
        now: float,
        why: str,
        retry_after_s: float | None = None,
    ) -> None:
        """Another attempt, or this outcome where there were enough."""
        self._note_trouble(now, f"does not work: {why[0].lower()}{why[1:].rstrip('.')}")
        pending.num_tries += 1
        if pending.num_tries <= self._server.max_retries:
            wait_s = self._pause_s(pending.num_tries, retry_after_s)
            heapq.heappush(self._later, (now + wait_s, next(self._order), pending))
        elif self._worked_at > sent_at and pending.num_tries > 1:
            self._done.append(outcome)  # it works for others
        else:
            self._unproven.append((pending, outcome))
            self._prove()

    def _pause_s(self, attempt: int, asked_s: float | None) -> float:
        return pause_s(
            attempt,
            first_s=self._server.backoff_s,
            longest_s=self._server.max_backoff_s,
            asked_s=asked_s,
        )

    def _outcome(self, number: int, answer: Answer) -> Outcome:
        if answer.status != 200:
            return Outcome(number, answer.status, answer.body)
        tokens, tells_cached, finish_reason = read_answer(answer.body)
        self._counts["prompt"] += tokens.prompt_tokens
        self._counts["generation"] += tokens.completion_tokens
        if tells_cached:
            self._counts["queries"] += tokens.prompt_tokens
            self._counts["hits"] += tokens.cached_tokens
        return Outcome(
            number,
            200,
            with_our_name(answer.body, self._spec.source, self._spec.name),
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
            cached_tokens=tokens.cached_tokens,
            reasoning_tokens=tokens.reasoning_tokens,
            finish_reason=finish_reason,
        )

    # -- does the server work? -----------------------------------------------------------------

    def _works(self, sent_at: float) -> None:
        # What was sent before may be answered still while nothing new is: it shows nothing of now.
        self._worked_at, self._trouble_since = max(self._worked_at, sent_at), None

    def _note_trouble(self, now: float, what: str) -> None:
        self._trouble = what
        if self._trouble_since is None:
            self._trouble_since = now

    def _is_out_of_patience(self, now: float) -> bool:
        since = self._trouble_since
        return since is not None and now - since > self._server.patience_s

    def _is_given_up(self, now: float) -> bool:
        """Whether the server is: now, where nothing is on its way any more, and it has refused
        everything for long, or wants to be left alone for long."""
        if self._failure is not None:
            return True
        if self._running or self._trouble_since is None or self._proving is not None:
            return False
        asked_s = self._held_until - now
        if self._is_out_of_patience(now) or asked_s > self._server.patience_s:
            self._failure = EngineUnavailable(
                f"The server of {self._spec.name} {self._trouble}.",
                retry_after_s=max(asked_s, 0.0),
                model=self._spec.name,
            )
        return self._failure is not None

    def _prove(self) -> None:
        """Find out whether the server works: then the outcomes that wait for that are true.

        Nothing new is sent meanwhile.
        """
        if self._proving is None:
            assert self._loop is not None
            self._proving = self._loop.create_task(self._proof())

    async def _proof(self) -> None:
        assert self._client is not None
        began = time.monotonic()
        asked = list(self._unproven)
        endpoints = {
            pending.endpoint
            for pending, outcome in asked
            if outcome.status_code not in _OF_THE_SERVER
        }
        try:
            await self._client.look()
            for endpoint in endpoints:
                await self._try_shortest(endpoint)
        except EngineUnavailable as error:
            self._failure = error
        else:
            self._works(began)
            self._looked_at = began
            known = [entry for entry in asked if entry in self._unproven]  # else: cancelled
            self._unproven = [entry for entry in self._unproven if entry not in known]
            self._done += [outcome for _, outcome in known]
        finally:
            self._proving = None
            self._wakeup.set()
        if self._unproven and self._failure is None:
            self._prove()

    async def _try_shortest(self, endpoint: str) -> None:
        """Raises EngineUnavailable where even that fails."""
        assert self._client is not None
        fields = {"model": self._spec.source, **SHORTEST[endpoint], **self._server.extra_body}
        answer = await self._client.post(endpoint, orjson.dumps(fields))
        if isinstance(answer, Answer):
            answer = understood(endpoint, answer)
        if isinstance(answer, NoAnswer):
            what = f"does not work: {answer.why[0].lower()}{answer.why[1:].rstrip('.')}"
        elif is_worth_another_try(answer.status):
            what = f"answers {answer.status}, also to the shortest request"
        else:
            return
        raise EngineUnavailable(f"The server of {self._spec.name} {what}.", model=self._spec.name)

    def _end(
        self,
        tasks: Collection[asyncio.Task[None]],
        *,
        timeout_s: float,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Cancel these; their connections are closed when it returns."""
        loop = loop or self._loop
        if not tasks or loop is None:
            return
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks, timeout=timeout_s))
