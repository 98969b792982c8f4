"""Hidden machines: engines simulated in virtual time, whose cost curves no estimator is told.

Written from how such an engine works, not from how its time is estimated: a scheduler that admits
in order, splits prefill into chunks, stores the KV cache in blocks and preempts the latest request
when it is full; a step whose time is the soft maximum of reading memory and of computing, with
batches padded as CUDA graphs are, an efficiency that saturates, work on the CPU beside it, noise
that hangs together from step to step, hiccups, and runs that are slower as a whole than others.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

BLOCK_TOKENS = 16
#: So many decoding steps at least are taken in one go, where nothing else happens.
_LEAP = 4


@dataclass(frozen=True)
class Machine:
    """A device with a model on it. Bytes, seconds, operations a second."""

    name: str
    weight_bytes: float
    num_parameters: float
    kv_bytes_per_token: float
    bandwidth: float
    flops: float
    kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_s: float  # launching, scheduling
    per_seq_s: float  # sampling and bookkeeping of one request in a step
    per_request_s: float  # rendering, tokenizing, answering
    half_tokens: float  # with so many tokens in a step, half of `flops` is reached
    sharpness: float  # of the soft maximum
    graph_up_to: int  # larger decoding batches run without a graph
    eager_s: float  # what that costs a step
    attention_flops_per_token: float  # of a prefill token for each token before it
    step_noise: float
    run_noise: float
    hiccup_s: float
    load_s: float

    def step_time(
        self, decode: Numbers, prefill: float, context: Numbers, attended: float
    ) -> Numbers:
        """Seconds of steps without noise; `context` of the decoding requests, shape (k,)."""
        small = 2 ** np.ceil(np.log2(np.maximum(decode, 1)))
        padded = np.where(decode <= 8, small, 8 * np.ceil(decode / 8))
        tokens = np.where(decode > 0, padded, 0) + prefill
        memory_s = (self.weight_bytes + self.kv_bytes_per_token * (context + attended)) / (
            self.bandwidth * (0.72 + 0.2 * context / (context + 20_000.0))
        )
        work = 2.0 * self.num_parameters * tokens + self.attention_flops_per_token * attended * (
            prefill / 1000.0
        )
        compute_s = work / self.flops * (tokens + self.half_tokens) / np.maximum(tokens, 1.0)
        p = self.sharpness
        device_s = (memory_s**p + compute_s**p) ** (1.0 / p)
        eager = (decode > self.graph_up_to) | (prefill > 0)
        host_s = self.step_s + self.per_seq_s * decode**1.08 + np.where(eager, self.eager_s, 0.0)
        # The host prepares a step while the device runs the last one, but not all of it.
        return np.maximum(device_s, host_s) + 0.35 * np.minimum(device_s, host_s)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("consumer-4b", 8.6e9, 4.3e9, 1.4e5, 7.2e11, 9.5e13, 34_000, 256, 8192,
                2.5e-3, 2.2e-5, 4e-4, 60, 3.0, 512, 1.2e-3, 2.6e6, 0.03, 0.02, 0.8, 26.0),
        Machine("datacenter-8b", 1.61e10, 8.0e9, 1.31e5, 3.1e12, 6.6e14, 410_000, 1024, 16384,
                2.2e-3, 1.1e-5, 2e-4, 220, 2.2, 512, 3e-3, 4.2e6, 0.04, 0.025, 0.5, 41.0),
        Machine("cpu-small", 1.2e9, 6.0e8, 5.6e4, 4.2e10, 7.5e11, 110_000, 512, 8192,
                6e-3, 9e-5, 1.5e-3, 6, 4.0, 0, 0.0, 4e5, 0.06, 0.03, 1.5, 9.0),
        Machine("tight-32b", 3.4e10, 3.2e10, 2.6e5, 1.6e12, 2.5e14, 52_000, 256, 4096,
                3e-3, 1.6e-5, 3e-4, 90, 2.6, 256, 2e-3, 8e6, 0.03, 0.02, 1.0, 95.0),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Requests in the order they are submitted. `cached`: of each prompt, what the cache holds."""

    prompt: Ints
    output: Ints  # 0: nothing is generated
    cached: Ints


@dataclass
class Moment:
    """The counters of the run so far, and what has finished since the last moment."""

    at_s: float
    num_running: int
    num_waiting: int
    prompt_tokens: float
    cached_tokens: float
    generation_tokens: float
    kv_usage: float
    finished: list[int] = field(default_factory=list)


class Run:
    """One run of a job on a machine. `moments` may be gone through once."""

    def __init__(self, machine: Machine, job: Job, seed: int, every_s: float = 1.0) -> None:
        self._machine = machine
        self._job = job
        self._random = np.random.default_rng(seed)
        self._every_s = every_s
        self.num_steps = 0
        self.num_preemptions = 0
        self.run_factor = float(np.exp(self._random.normal(0.0, machine.run_noise)))
        self._drift = 0.0
        self._noise: deque[float] = deque()

    def moments(self) -> Iterator[Moment]:
        machine, job = self._machine, self._job
        outputs, prompts, cached = (a.tolist() for a in (job.output, job.prompt, job.cached))
        waiting: deque[int] = deque(range(len(outputs)))
        prefilling: deque[list[int]] = deque()  # [request, tokens left, tokens in the cache]
        decoding: list[tuple[int, int]] = []  # a heap by the step of the last token
        order: list[int] = []  # as admitted, the latest last
        began: dict[int, int] = {}  # decoding request: the step of its first token
        made: dict[int, int] = {}  # preempted request: tokens it had
        base: dict[int, int] = {}  # request: tokens in the cache when decoding began
        alive: set[int] = set()
        context = 0  # tokens of the decoding requests
        held = 0  # tokens of those being prefilled, all of their prompt
        now_s, next_s, step = 0.0, self._every_s, 0
        moment = Moment(0.0, 0, len(waiting), 0.0, 0.0, 0.0, 0.0)
        finished: list[int] = []
        while waiting or prefilling or alive:
            # The latest ones make room when the cache is full.
            while context + held + BLOCK_TOKENS * len(alive) > machine.kv_tokens and len(alive) > 1:
                victim = order.pop()
                while victim not in alive:
                    victim = order.pop()
                alive.discard(victim)
                had = step - began[victim]
                made[victim] = made.get(victim, 0) + had + 1
                context -= base[victim] + had
                waiting.appendleft(victim)
                self.num_preemptions += 1
            budget = machine.max_num_batched_tokens - len(alive)
            used = (context + held + BLOCK_TOKENS * (len(alive) + len(prefilling))) * 1.0
            while (
                waiting
                and len(alive) + len(prefilling) < machine.max_num_seqs
                and (not prefilling or sum(one[1] for one in prefilling) < budget)
            ):
                request = waiting[0]
                size = prompts[request] + made.get(request, 0)
                room = 0.01 * machine.kv_tokens if alive or prefilling else -1e18
                if used + size + BLOCK_TOKENS > machine.kv_tokens - room and (alive or prefilling):
                    break
                waiting.popleft()
                hit = min(cached[request], size - 1) if request not in made else size // 2
                prefilling.append([request, size - hit, size])
                held += size
                used += size + BLOCK_TOKENS
                if request not in made:
                    moment.cached_tokens += hit
                    now_s += machine.per_request_s * 0.5
            left, prefill, attended, begun = budget, 0, 0.0, []
            for one in prefilling:
                take = min(left, one[1])
                attended += one[2] - one[1] + take / 2
                one[1] -= take
                left -= take
                prefill += take
                if one[1] == 0:
                    begun.append(one)
                if left <= 0:
                    break
            # A leap over steps in which nothing but decoding happens.
            num = 1
            if not prefill and decoding:
                room = machine.kv_tokens - context - BLOCK_TOKENS * len(alive)
                num = min(decoding[0][0] - step, max(room // max(len(alive), 1), 1), 256)
                num = max(num, 1) if num >= _LEAP else 1
            size_now = float(len(alive))
            contexts = context + size_now * np.arange(num, dtype=np.float64)
            times = machine.step_time(np.full(num, size_now), float(prefill), contexts, attended)
            times = times * self._noises(num)
            now_s += float(times.sum())
            step += num
            self.num_steps += num
            context += len(alive) * num
            moment.generation_tokens += len(alive) * num
            while decoding and decoding[0][0] <= step:
                end, request = heapq.heappop(decoding)
                if (
                    request not in alive
                    or began[request] + self._left(request, outputs, made) - 1 != end
                ):
                    continue
                alive.discard(request)
                context -= base[request] + step - began[request]
                finished.append(request)
                now_s += machine.per_request_s * 0.5
            for request, _, size in begun:
                prefilling.popleft()
                held -= size
                if request not in made:
                    moment.prompt_tokens += prompts[request]
                rest = self._left(request, outputs, made)
                if outputs[request]:
                    moment.generation_tokens += 1
                if rest <= 1:
                    finished.append(request)
                    now_s += machine.per_request_s * 0.5
                    continue
                began[request] = step
                base[request] = size + 1
                alive.add(request)
                order.append(request)
                context += size + 1
                heapq.heappush(decoding, (step + rest - 1, request))
            if now_s >= next_s:
                next_s = now_s + self._every_s
                yield self._moment(
                    moment, now_s, alive, prefilling, waiting, context + held, finished
                )
                finished = []
        yield self._moment(moment, now_s, alive, prefilling, waiting, 0, finished)

    @staticmethod
    def _left(request: int, outputs: list[int], made: dict[int, int]) -> int:
        return outputs[request] - made.get(request, 0)

    def _moment(
        self,
        moment: Moment,
        now_s: float,
        alive: set[int],
        prefilling: deque[list[int]],
        waiting: deque[int],
        held: int,
        finished: list[int],
    ) -> Moment:
        return Moment(
            now_s,
            len(alive) + len(prefilling),
            len(waiting),
            moment.prompt_tokens,
            moment.cached_tokens,
            moment.generation_tokens,
            held / self._machine.kv_tokens,
            finished,
        )

    def _noises(self, num: int) -> npt.NDArray[np.float64]:
        """Of each step the factor by which chance changes its time."""
        if len(self._noise) < num:
            machine = self._machine
            fresh = self._random.normal(0.0, 1.0, 8192)
            slow = np.empty(8192)
            value = self._drift
            for place, shock in enumerate(self._random.normal(0.0, 1.0, 8192).tolist()):
                value = 0.999 * value + 0.0447 * shock
                slow[place] = value
            self._drift = value
            factors = np.exp(machine.step_noise * (0.8 * fresh + 0.6 * slow)) * self.run_factor
            hiccups = self._random.random(8192) < 2e-4
            longer = self._random.exponential(machine.hiccup_s, int(hiccups.sum()))
            factors[hiccups] *= 1.0 + 40 * longer
            self._noise.extend(factors.tolist())
        return np.array([self._noise.popleft() for _ in range(num)])
