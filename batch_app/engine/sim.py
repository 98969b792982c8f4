"""The simulated engine: no model, the same interface, answers that can be checked.

For fast tests and for measuring everything around the engine. It is chosen by name in the registry
(`engine = "sim"`) and never stands in for another. The answer to a request is its last message (or
prompt) said back, so that a test can tell whose answer it holds.

`engine_args` it knows, all optional: `max_num_seqs`, `max_model_len` (tokens are words here),
`prefill_token_s` and `decode_step_s` (seconds a prompt token, and an output token, take),
`load_s`, `oom_above_seqs` (out of memory at the start with more requests side by side), and the
faults `fail_load`, `die_after`, `hang_after` (after so many answers), `poison` (it dies of a prompt
with this word, be it told ahead while it loads) and `memory_seqs` (for more at a time it has no
memory). With `hold_after` and `hold_while` it stands still after so many answers, as long as this
file exists: what has to happen in the middle of a batch does, however fast or slow the machine.
With `load_errors`, a file of texts, each load fails as vLLM would with the first of its lines, and
takes that line away.
With `from_hub` its `source` is fetched from the model hub as a model's is, and not looked at.
To the file `journal` goes a line for every answer: what was computed, also in vain.
"""

from __future__ import annotations

import heapq
import os
import signal
import time
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import orjson

from batch_app import __version__
from batch_app.core import Endpoint, EngineLimits, FinishReason, LimitsTried, LoadRetry
from batch_app.engine.base import (
    Engine,
    EngineInfo,
    EngineRequest,
    EngineStats,
    ModelSpec,
    Outcome,
)
from batch_app.engine.limits import lowered_for
from batch_app.engine.vllm_load_errors import load_error
from batch_app.errors import EngineLoadError, EngineOutOfMemory

_KNOWN_ARGS = frozenset(
    {
        "max_num_seqs",
        "max_model_len",
        "prefill_token_s",
        "decode_step_s",
        "load_errors",
        "load_s",
        "oom_above_seqs",
        "fail_load",
        "die_after",
        "hang_after",
        "hold_after",
        "hold_while",
        "poison",
        "memory_seqs",
        "journal",
        "from_hub",
    }
)
_DEVICE = "simulated"
_LOOK_EVERY_S = 0.01
_ENDPOINTS = (Endpoint.CHAT_COMPLETIONS, Endpoint.COMPLETIONS)


class SimEngine(Engine):
    """Runs up to `max_num_seqs` requests side by side, each for as long as its tokens say."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        args = spec.engine_args
        self._max_num_seqs = int(args.get("max_num_seqs", 256))
        self._max_model_len = int(args.get("max_model_len", 1 << 20))
        self._prefill_token_s = float(args.get("prefill_token_s", 0.0))
        self._decode_step_s = float(args.get("decode_step_s", 0.0))
        self._waiting: deque[EngineRequest] = deque()
        self._running: list[tuple[float, int, Outcome]] = []  # a heap by time of finishing
        self._num_answers = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def load(self, ahead: Sequence[EngineRequest] = ()) -> EngineInfo:
        args = self._spec.engine_args
        unknown = sorted(set(args) - _KNOWN_ARGS)
        if unknown:
            raise EngineLoadError(f"The simulated engine has no argument {unknown[0]!r}.")
        if args.get("fail_load"):
            raise EngineLoadError(str(args["fail_load"]))
        lowered = lowered_for(self._spec, _DEVICE, __version__)
        if lowered is not None:
            self._max_num_seqs = lowered.max_num_seqs
        if path := args.get("load_errors"):
            self._fail_like_vllm(Path(str(path)))
        load_s = float(args.get("load_s", 0.0))
        time.sleep(load_s)
        for request in ahead if "poison" in args else ():
            self._answer(request)
        if self._max_num_seqs > args.get("oom_above_seqs", self._max_num_seqs):
            raise EngineLoadError(
                f"model {self._spec.name!r} could not be loaded: out of memory",
                retriable=True,
                retry=LoadRetry(too_large=self._limits_tried()),
            )
        return EngineInfo(
            engine="sim",
            engine_version=__version__,
            model=self._spec.name,
            device=_DEVICE,
            device_type="cpu",
            load_s=load_s,
            max_model_len=self._max_model_len,
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_seqs * 16,
            gpu_memory_utilization=self._spec.gpu_memory_utilization,
            endpoints=_ENDPOINTS,
            least_batched_tokens=1,
            limits_source="lowered after it ran out of memory" if lowered else "",
        )

    def _limits_tried(self) -> LimitsTried:
        share = self._spec.gpu_memory_utilization
        limits = EngineLimits(self._max_num_seqs, self._max_num_seqs * 16, share)
        return LimitsTried(limits, _DEVICE, __version__)

    def _fail_like_vllm(self, path: Path) -> None:
        texts = path.read_text(encoding="utf-8").splitlines()
        if texts:
            path.write_text("\n".join(texts[1:]), encoding="utf-8")
            raise load_error(self._spec, RuntimeError(texts[0]), self._limits_tried())

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        self._waiting.extend(requests)

    def cancel(self, numbers: Collection[int]) -> None:
        gone = set(numbers)
        self._waiting = deque(r for r in self._waiting if r.number not in gone)
        self._running = [entry for entry in self._running if entry[2].number not in gone]
        heapq.heapify(self._running)

    def collect(self, timeout_s: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout_s
        finished: list[Outcome] = []
        while self._waiting or self._running:
            now = time.monotonic()
            if self._holds():
                if now >= deadline:
                    break
                time.sleep(min(_LOOK_EVERY_S, deadline - now))
                continue
            self._admit(now)
            while self._running and self._running[0][0] <= now:
                finished.append(heapq.heappop(self._running)[2])
            if finished:
                break
            if now >= deadline:
                break
            time.sleep(max(0.0, min(self._running[0][0], deadline) - now))
        for outcome in finished:
            self._count(outcome)
        return finished

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            at_s=time.monotonic(),
        )

    def close(self) -> None:
        self._waiting.clear()
        self._running.clear()

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting.popleft()
            outcome = self._answer(request)
            duration_s = (
                outcome.prompt_tokens * self._prefill_token_s
                + outcome.completion_tokens * self._decode_step_s
            )
            heapq.heappush(self._running, (now + duration_s, request.number, outcome))
        if len(self._running) > self._spec.engine_args.get("memory_seqs", len(self._running)):
            raise EngineOutOfMemory("Out of memory, as the registry says.")

    def _holds(self) -> bool:
        args = self._spec.engine_args
        after = args.get("hold_after")
        return (
            after is not None
            and self._num_answers >= int(after)
            and Path(str(args["hold_while"])).exists()
        )

    def _count(self, outcome: Outcome) -> None:
        self._num_answers += 1
        self._prompt_tokens += outcome.prompt_tokens
        self._generation_tokens += outcome.completion_tokens
        args = self._spec.engine_args
        if journal := args.get("journal"):
            with Path(journal).open("ab") as file:
                file.write(b"%d\n" % outcome.number)
        if self._num_answers == args.get("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._num_answers == args.get("hang_after"):
            while True:
                time.sleep(3600)

    def _answer(self, request: EngineRequest) -> Outcome:
        try:
            body = orjson.loads(request.body)
            text = _prompt(request.endpoint, body)
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            return _refusal(request.number, 400, "The body can't be understood.", None)
        if request.endpoint not in _ENDPOINTS:
            return _refusal(request.number, 404, f"No {request.endpoint} here.", None)
        if body.get("stream"):
            return _refusal(request.number, 400, "A batch can't stream.", "stream")
        words = text.split()
        if self._spec.engine_args.get("poison") in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(words) > self._max_model_len:
            return _refusal(
                request.number,
                400,
                f"This model's maximum context length is {self._max_model_len} tokens. "
                f"However, your request has {len(words)} input tokens.",
                "messages",
            )
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        said = words if limit is None else words[:limit]
        finish_reason = FinishReason.LENGTH if len(said) < len(words) else FinishReason.STOP
        response = self._response(
            request, " ".join(said), len(words), len(said), finish_reason.value
        )
        return Outcome(
            number=request.number,
            status_code=200,
            body=orjson.dumps(response),
            prompt_tokens=len(words),
            completion_tokens=len(said),
            finish_reason=finish_reason,
        )

    def _response(
        self,
        request: EngineRequest,
        text: str,
        prompt_tokens: int,
        completion_tokens: int,
        finish_reason: str,
    ) -> dict[str, Any]:
        chat = request.endpoint == Endpoint.CHAT_COMPLETIONS
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.number:x}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._spec.name,
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }


def _prompt(endpoint: str, body: dict[str, Any]) -> str:
    if endpoint == Endpoint.CHAT_COMPLETIONS:
        return str(body["messages"][-1]["content"])
    return str(body.get("prompt", ""))


def _refusal(number: int, status_code: int, message: str, param: str | None) -> Outcome:
    kind = "NotFoundError" if status_code == 404 else "BadRequestError"
    error = {"message": message, "type": kind, "param": param, "code": status_code}
    return Outcome(number=number, status_code=status_code, body=orjson.dumps({"error": error}))
