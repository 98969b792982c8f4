"""The same trials with the real engine and the model that ships, on this machine.

Needs vLLM and a machine that does nothing else; takes three minutes, and five more a round, on two
cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from batch_app.benchmarks import record_from_run
from batch_app.core import Endpoint
from batch_app.engine.base import EngineInfo, EngineRequest, ModelSpec, Outcome
from batch_app.engine.host import EngineHost
from batch_app.forecast.forecast import Forecaster
from batch_app.forecast.live import LiveForecast
from batch_app.forecast.measurement import Measurement, Reading
from batch_app.forecast.recording import Recording
from batch_app.forecast.workload import Workload
from batch_app.measuring import reading_of
from benchmarks.estimates.real_shapes import REAL_SHAPES, Asked
from benchmarks.estimates.shapes import Traces
from benchmarks.estimates.trial import LOOKS, NOW, Live, Trial, informed_s
from benchmarks.peer.machine import this_machine

DEMO = Path(__file__).parents[2] / "models" / "demo"
CHAT = str(Endpoint.CHAT_COMPLETIONS)
#: A benchmark and a held-out job take about so long; never more requests than this.
BENCH_S, JOB_S, MOST_REQUESTS = 15.0, 30.0, 12_000
NUM_BENCHMARKS = 5
#: So few side by side that even a job of some seconds fills them many times.
NUM_SLOTS = 32
#: To be warm, and of a benchmark at least: fewer say nothing of how many run side by side later.
_WARM_REQUESTS, _LEAST_REQUESTS = 32, 100
READ_EVERY_S = 0.25


@dataclass(frozen=True)
class Look:
    """What was known after so many seconds: the engine's latest word, as old as it is by then, and
    what has finished since the look before."""

    at_s: float
    reading: Reading
    finished: list[int]


@dataclass
class Ran:
    """What a job on the real engine showed."""

    seconds: float
    outcomes: dict[int, Outcome]
    looks: list[Look]


def trials(
    log_path: Path, traces: Traces, rounds: int, seed: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure each shape, then forecast and run each from measurements of five others."""
    spec = ModelSpec(
        name="demo",
        engine="vllm",
        source=str(DEMO),
        engine_args={
            "max_model_len": 2048,
            "max_num_seqs": NUM_SLOTS,
            "enforce_eager": True,
            "dtype": this_machine().dtype,
        },
    )
    random = np.random.default_rng(seed)
    engine = EngineHost(spec, log_path=log_path)
    try:
        info = engine.load()
        for shape in REAL_SHAPES.values():  # to be warm
            _run(engine, shape.make(traces, random, _WARM_REQUESTS))
        measurements: dict[str, Measurement] = {}
        paces: dict[str, float] = {}
        for name, shape in REAL_SHAPES.items():
            jobs = shape.make(traces, random, _LEAST_REQUESTS)
            ran = _run(engine, jobs)
            if ran.seconds < BENCH_S / 2:
                jobs = shape.make(traces, random, _size(len(jobs) / ran.seconds * BENCH_S))
                ran = _run(engine, jobs)
            measurements[name] = _measurement(name, info, jobs, ran)
            paces[name] = len(jobs) / ran.seconds
            say(f"measured {name}: {len(jobs):,} requests in {ran.seconds:.1f} s")
        found = []
        for name in [*REAL_SHAPES] * rounds:
            num = _size(paces[name] * JOB_S * float(random.uniform(0.6, 1.4)))
            others = [other for other in REAL_SHAPES if other != name]
            chosen = random.choice(others, NUM_BENCHMARKS, replace=False).tolist()
            jobs = REAL_SHAPES[name].make(traces, random, num)
            trial = _tried(engine, info, name, jobs, [measurements[other] for other in chosen])
            say(
                f"{name}: expected {trial.expected_s:.1f} s "
                f"({trial.low_s:.1f} to {trial.high_s:.1f}), took {trial.actual_s:.1f} s"
            )
            found.append(trial.as_dict())
        return found
    finally:
        engine.close()


def _size(wanted: float) -> int:
    return int(np.clip(wanted, _LEAST_REQUESTS, MOST_REQUESTS))


def _run(engine: EngineHost, jobs: list[Asked]) -> Ran:
    """As the worker does it: a window of requests, refilled as they finish."""
    info = engine.info
    assert info is not None
    upcoming = iter(enumerate(jobs))
    window = 4 * min(info.max_num_seqs, 128)
    in_flight = 0
    outcomes: dict[int, Outcome] = {}
    began_s = time.monotonic()
    looks = [Look(0.0, reading_of(engine.stats(), at_s=0.0), [])]
    next_s, fresh = READ_EVERY_S, list[int]()
    while len(outcomes) < len(jobs):
        batch = []
        while in_flight < window and (one := next(upcoming, None)) is not None:
            body = orjson.dumps({"model": "demo"} | one[1].body)
            batch.append(EngineRequest(one[0], CHAT, body))
            in_flight += 1
        if batch:
            engine.submit(batch)
        for outcome in engine.collect(0.1):
            if outcome.status_code != 200:
                raise RuntimeError(f"The engine answered {outcome.status_code}: {outcome.body!r}")
            outcomes[outcome.number] = outcome
            fresh.append(outcome.number)
            in_flight -= 1
        now_s = time.monotonic() - began_s
        stats = engine.stats()
        said_s = stats.at_s - began_s
        # Of the same word twice, the second would seem a time in which nothing was done.
        if now_s >= next_s and said_s > looks[-1].reading.at_s:
            looks.append(Look(now_s, reading_of(stats, at_s=said_s), fresh))
            next_s, fresh = now_s + READ_EVERY_S, []
    return Ran(time.monotonic() - began_s, outcomes, looks)


def _measurement(name: str, info: EngineInfo, jobs: list[Asked], ran: Ran) -> Measurement:
    recording = Recording(info.kv_cache_tokens)
    for number, outcome in ran.outcomes.items():
        recording.finish(
            CHAT,
            jobs[number].limit,
            prompt_tokens=outcome.prompt_tokens,
            output_tokens=outcome.completion_tokens,
            cached_tokens=outcome.cached_tokens,
        )
    for look in ran.looks:
        recording.read(look.reading)
    outcomes = ran.outcomes.values()
    record = record_from_run(
        batch_id=f"batch_{name}",
        model="demo",
        engine=info.engine,
        engine_version=info.engine_version,
        device=info.device_type,
        device_name=info.device,
        num_requests=len(jobs),
        success_count=len(jobs),
        load_s=info.load_s,
        inference_s=ran.seconds,
        cached_prompt_tokens=sum(one.cached_tokens for one in outcomes),
        prompt_tokens=sum(one.prompt_tokens for one in outcomes),
        completion_tokens=sum(one.completion_tokens for one in outcomes),
        engine_args={
            "max_model_len": info.max_model_len,
            "max_num_seqs": info.max_num_seqs,
            "max_num_batched_tokens": info.max_num_batched_tokens,
            "kv_cache_tokens": info.kv_cache_tokens,
        },
        timestamp=datetime.now(UTC) if info.engine_version else NOW,
        recording=recording,
        registry_args={},
    )
    return record.measurement()


def _tried(
    engine: EngineHost,
    info: EngineInfo,
    name: str,
    jobs: list[Asked],
    others: list[Measurement],
) -> Trial:
    """Run it, and say what was and would have been expected: nothing here looks ahead."""
    ran = _run(engine, jobs)
    num = len(jobs)
    # Intake counts the prompts' tokens exactly; here the engine's own count stands for it.
    prompts = np.array([ran.outcomes[number].prompt_tokens for number in range(num)])
    outputs = np.array([ran.outcomes[number].completion_tokens for number in range(num)])
    spared_share = sum(one.cacheable for one in jobs) / max(int(prompts.sum()), 1)
    workload, group_of = Workload.of_requests(
        endpoints=(CHAT,),
        endpoint_of=np.zeros(num, int),
        max_tokens=np.array([one.limit for one in jobs]),
        generating=(True,),
        prompt_tokens=prompts,
        spared_share=spared_share,
        fixed=np.array([one.fixed for one in jobs]),
    )
    forecaster = Forecaster(others[0].setting, others)
    forecast = forecaster.forecast(workload)
    assert forecast is not None
    live = LiveForecast(forecaster, workload, group_of, prompts)
    lives: list[Live] = []
    done = 0
    for look in ran.looks:
        for number in look.finished:
            one = ran.outcomes[number]
            live.finish(number, one.completion_tokens, one.prompt_tokens, one.cached_tokens)
        done += len(look.finished)
        live.read(look.reading)
        if len(lives) < len(LOOKS) and LOOKS[len(lives)] * num <= done < num:
            left = live.remaining()
            assert left is not None
            # Both are of what was left when the engine last said something.
            age_s = look.at_s - look.reading.at_s
            lives.append(
                Live(
                    done / num,
                    ran.seconds - look.reading.at_s,
                    left.remaining_s,
                    left.low_s,
                    left.high_s,
                    age_s + look.at_s * (num - done) / done,
                )
            )
    return Trial(
        machine=info.device,
        shape=name,
        num_requests=num,
        basis=tuple(one.id for one in others),
        actual_s=ran.seconds,
        expected_s=forecast.run_s,
        low_s=forecast.low_s,
        high_s=forecast.high_s,
        scaled_s=num * others[0].inference_s / others[0].num_requests,
        informed_s=informed_s(forecaster, prompts, outputs, spared_share),
        actual_output=float(outputs.sum()),
        expected_output=forecast.expected_output_tokens,
        lives=tuple(lives),
    )
