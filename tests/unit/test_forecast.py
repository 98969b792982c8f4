"""Forecasts before a run: the workload, the schedule, the fit, the range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batch_app.benchmarks import BenchmarkRecord, record_from_run
from batch_app.estimates import Forecasters
from batch_app.forecast import cost, roofline
from batch_app.forecast.forecast import RANGE_SIGMAS, Forecaster
from batch_app.forecast.lengths import LengthModel, Lifetimes, product_limit
from batch_app.forecast.measurement import Limits, MeasuredGroup, Measurement, Reading, Setting
from batch_app.forecast.recording import Recording
from batch_app.forecast.roofline import Device, ModelSize
from batch_app.forecast.schedule import Capacity, Steps, schedule
from batch_app.forecast.workload import LEVELS, RequestGroup, Workload, sketch
from tests.unit.test_benchmarks import NOW

SHIPPED = Path(__file__).parents[2] / "benchmarks" / "metadata"
GUIDE = BenchmarkRecord.model_validate_json(
    (SHIPPED / "vllm-native-gemma3-4b-5000-2025-10-28.json").read_bytes()
)
HERE = Setting("m", "a machine", "vllm", "1", "{}")
LIMITS = Limits(max_num_seqs=16, max_num_batched_tokens=512, kv_cache_tokens=20_000)


def like_the_guide(num: int) -> Workload:
    return Workload((RequestGroup(num, prompt_tokens=788.4308 * num),))


def measured(
    num: int = 500,
    *,
    prompt: float = 300,
    output: float = 100,
    seconds: float = 100.0,
    setting: Setting = HERE,
    limit: float | None = 400,
    name: str = "one",
) -> Measurement:
    quantiles = tuple(output * (0.3 + 1.4 * level) for level in LEVELS)
    group = MeasuredGroup("/v1/chat/completions", limit, num, output, quantiles, prompt)
    return Measurement(
        id=name,
        setting=setting,
        num_requests=num,
        prompt_tokens=prompt * num,
        output_tokens=output * num,
        inference_s=seconds,
        load_s=10.0,
        groups=(group,),
        limits=LIMITS,
    )


def asked(num: int = 1000, prompt: float = 300, limit: float | None = 400) -> Workload:
    return Workload((RequestGroup(num, max_tokens=limit, prompt_tokens=prompt * num),))


# -- the guide's own figures -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "unit_s", "shown"),
    [(100, 1, "73"), (5_000, 60, "37"), (50_000, 3600, "6.1"), (200_000, 3600, "24.5")],
)
def test_the_guide_s_table_from_its_benchmark_alone(num: int, unit_s: float, shown: str) -> None:
    forecast = Forecaster(Setting(GUIDE.model), [GUIDE.measurement()]).forecast(like_the_guide(num))
    assert forecast is not None
    digits = 1 if "." in shown else 0
    assert f"{forecast.total_s / unit_s:.{digits}f}" == shown
    assert round(forecast.throughput_tokens_per_s) == 2511
    assert round(forecast.throughput_requests_per_s, 2) == 2.29
    assert forecast.expected_output_tokens == pytest.approx(308.04 * num, rel=0.002)
    assert forecast.basis == (GUIDE.test_id,)
    assert forecast.basis_kind == "similar"


def test_prompts_that_were_not_counted_are_as_those_that_were_measured() -> None:
    forecaster = Forecaster(Setting(GUIDE.model), [GUIDE.measurement()])
    unknown = forecaster.forecast(Workload((RequestGroup(100, prompt_known=False),)))
    known = forecaster.forecast(like_the_guide(100))
    assert unknown is not None
    assert known is not None
    assert unknown.run_s == pytest.approx(known.run_s, rel=0.001)
    assert unknown.high_s / unknown.low_s > known.high_s / known.low_s


# -- what holds for every forecast -------------------------------------------------------------


def test_more_requests_never_take_less() -> None:
    forecaster = Forecaster(HERE, [measured()])
    sizes = [1, 2, 5, 17, 60, 200, 900, 2000, 2048, 2049, 2100, 3000, 5000, 20_000, 10**6]
    seconds = []
    for num in sizes:
        forecast = forecaster.forecast(asked(num))
        assert forecast is not None
        assert 0 < forecast.low_s <= forecast.run_s <= forecast.high_s
        assert forecast.load_s == 10.0
        seconds.append(forecast.run_s)
    assert seconds == sorted(seconds)


def test_more_tokens_never_take_less() -> None:
    forecaster = Forecaster(HERE, [measured()])

    def run_s(workload: Workload) -> float:
        forecast = forecaster.forecast(workload)
        assert forecast is not None
        return forecast.run_s

    by_prompt = [run_s(asked(prompt=prompt)) for prompt in (10, 100, 300, 1000, 4000)]
    assert by_prompt == sorted(by_prompt)
    by_limit = [run_s(asked(limit=limit)) for limit in (1, 8, 50, 100, 300)]
    assert by_limit == sorted(by_limit)
    group = asked().groups[0]
    spared = replace(group, spared_tokens=0.8 * group.prompt_tokens)
    assert run_s(Workload((spared,))) < run_s(asked())
    fixed = replace(group, fixed_tokens=True)
    assert run_s(Workload((fixed,))) > run_s(asked())
    nothing = replace(group, generates=False)
    assert run_s(Workload((nothing,))) < run_s(asked())


def test_a_measured_run_is_forecast_as_it_was() -> None:
    forecast = Forecaster(HERE, [measured()]).forecast(asked(500))
    assert forecast is not None
    assert forecast.run_s == pytest.approx(100, rel=0.02)
    assert forecast.basis_kind == "measured"


def test_what_was_measured_elsewhere_counts_little() -> None:
    there = replace(HERE, machine="another machine")
    here, other = measured(name="here"), measured(seconds=1000, setting=there, name="there")
    forecast = Forecaster(HERE, [other, here]).forecast(asked(500))
    assert forecast is not None
    assert forecast.run_s == pytest.approx(100, rel=0.05)
    assert forecast.basis[0] == "here"
    alone = Forecaster(HERE, [other]).forecast(asked(500))
    assert alone is not None
    assert alone.basis_kind == "similar"
    assert alone.high_s / alone.low_s > 4
    assert Forecaster(HERE, [replace(here, is_outlier=True)]).forecast(asked()) is None
    assert Forecaster(Setting("another model"), [here]).forecast(asked()) is None


def test_loads_that_differ_are_less_sure() -> None:
    def sigma(*loads: float) -> float:
        runs = [replace(measured(name=f"{n}"), load_s=load) for n, load in enumerate(loads)]
        return Forecaster(HERE, runs).load_sigma

    assert sigma(20, 20, 21, 20, 20) < sigma(20) < sigma(20, 60)
    elsewhere = replace(measured(), setting=replace(HERE, machine="another"))
    assert Forecaster(HERE, [elsewhere]).load_sigma > sigma(20)


def test_an_odd_run_is_noticed_and_pulls_little() -> None:
    # Enough that one of them can be odd.
    usual = [measured(seconds=100 + place, name=f"run-{place}") for place in range(5)]
    odd = measured(seconds=400, name="odd")
    forecaster = Forecaster(HERE, usual)
    assert abs(forecaster.log_error(usual[0]) or 0) < 1
    assert (forecaster.log_error(odd) or 0) > 4
    forecast = Forecaster(HERE, [odd, *usual]).forecast(asked(500))
    assert forecast is not None
    assert forecast.run_s < 150


def test_a_roofline_where_nothing_was_measured() -> None:
    size = ModelSize(num_parameters=4e9, weight_bytes=8e9, kv_bytes_per_token=1.4e5)
    fast = Device("fast", 3e12, 1e15, 80e9)
    slow = Device("slow", 7e11, 1e14, 16e9)
    found = [
        Forecaster(HERE, [], size=size, device=device).forecast(asked()) for device in (fast, slow)
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].basis_kind == found[1].basis_kind == "roofline"
    assert found[0].basis == ()
    assert 2 < found[1].run_s / found[0].run_s < 15
    assert found[0].high_s / found[0].low_s > 3
    assert found[0].load_s == pytest.approx(26, rel=0.2)
    loaded = Forecaster(HERE, [], size=size, device=fast).forecast(asked(), loads_model=False)
    assert loaded is not None
    assert loaded.load_s == 0
    # A measurement goes before what the data sheet says.
    both = Forecaster(HERE, [measured()], size=size, device=fast).forecast(asked(500))
    assert both is not None
    assert both.run_s == pytest.approx(100, rel=0.05)
    assert roofline.kv_cache_tokens(size, slow) == pytest.approx(40_000, rel=0.02)
    assert roofline.kv_cache_tokens(size, replace(slow, memory_bytes=4e9)) is None


# -- workload ----------------------------------------------------------------------------------


def test_groups_of_requests_and_the_error_of_a_sample() -> None:
    random = np.random.default_rng(1)
    num = 5000
    prompts = random.integers(10, 1000, num)
    limits = random.integers(0, 2000, num)
    endpoint_of = random.integers(0, 2, num)
    told = {
        "endpoints": ("chat", "embed"),
        "generating": (True, False),
        "endpoint_of": endpoint_of,
        "max_tokens": limits,
    }
    whole, group_of = Workload.of_requests(prompt_tokens=prompts, spared_share=0.25, **told)
    assert whole.num_requests == num
    assert whole.prompt_tokens == pytest.approx(prompts.sum())
    assert whole.spared_tokens == pytest.approx(prompts.sum() / 4)
    assert whole.prompt_error == 0
    assert len(whole.groups) <= 24
    for number, group in enumerate(whole.groups):
        inside = group_of == number
        assert group.num_requests == inside.sum()
        assert group.prompt_tokens == pytest.approx(prompts[inside].sum())
        assert set(endpoint_of[inside]) == {("chat", "embed").index(group.endpoint)}
    chosen = random.permutation(num)[:500]
    sample, _ = Workload.of_requests(prompt_tokens=prompts[chosen], counted=chosen, **told)
    assert sample.num_requests == num
    apart = abs(sample.prompt_tokens / prompts.sum() - 1)
    assert 0 < sample.prompt_error < 0.1
    assert apart < 3.5 * sample.prompt_error


# -- schedule ----------------------------------------------------------------------------------


def totals(steps: Steps) -> tuple[float, float]:
    return float((steps.count * steps.running).sum()), float((steps.count * steps.prefill).sum())


def test_the_steps_of_few_requests_are_as_by_hand() -> None:
    # One after the other: a step for the prompt and its first token, then one a token.
    steps = schedule([10, 10], [10, 10], [5, 3], Capacity(max_num_seqs=1))
    assert steps.num_steps == 5 + 3
    # Side by side: as many as the longer one has.
    assert schedule([10, 10], [10, 10], [5, 3], Capacity(max_num_seqs=2)).num_steps == 5
    # A prompt in chunks.
    chunks = schedule([100], [100], [0], Capacity(max_num_batched_tokens=30))
    assert chunks.num_steps == 4
    # Three had some tokens already.
    assert schedule([9, 9], [9, 9], [20, 7], Capacity(), num_begun=2, had=[5, 5]).num_steps == 15


def test_the_schedule_loses_no_token_and_keeps_within_the_cache() -> None:
    random = np.random.default_rng(7)
    prompts, outputs = random.integers(1, 300, 400), random.integers(1, 80, 400)
    roomy = schedule(prompts, prompts, outputs, Capacity(32, 512, 10**6))
    decoded, prefilled = totals(roomy)
    assert prefilled == prompts.sum()
    assert decoded == (outputs - 1).sum()  # the first one comes of the prompt
    tight = schedule(prompts, prompts, outputs, Capacity(32, 512, 2000))
    assert tight.num_steps > roomy.num_steps
    assert tight.context.max() <= 2000 + 32
    assert tight.running.max() < roomy.running.max()


# -- lengths -----------------------------------------------------------------------------------


def test_answers_that_were_cut_are_longer_than_their_limit() -> None:
    lengths = np.array([10.0, 20.0, 30.0, 30.0])
    ended = np.array([True, True, False, False])
    natural = product_limit(lengths, np.ones(4), ended)
    assert natural.shares.sum() == pytest.approx(1)
    assert natural.mean(30.0) == pytest.approx(22.5)
    assert natural.mean(None) > 30
    cut = replace(measured(output=100, limit=128).groups[0], num_cut=250)
    model = LengthModel([(replace(measured(), groups=(cut,)), 1.0)])
    wide = model.of(RequestGroup(10, max_tokens=1000, prompt_tokens=3000))
    assert wide.mean(1000) > 110


def test_lengths_by_prompt_and_their_spread() -> None:
    short, long = measured(prompt=50, output=20), measured(prompt=3000, output=300, name="two")
    model = LengthModel([(short, 1.0), (long, 1.0)])
    of_short = model.of(RequestGroup(10, max_tokens=400, prompt_tokens=500))
    of_long = model.of(RequestGroup(10, max_tokens=400, prompt_tokens=30_000))
    assert of_short.mean(400) < 40
    assert of_long.mean(400) > 250
    alike = LengthModel([(measured(name=f"{place}"), 1.0) for place in range(8)])
    assert alike.spread < model.spread


@pytest.mark.parametrize("num", [1, 5, 60, 400])
def test_four_of_five_times_chance_stays_within_its_range(num: int) -> None:
    random = np.random.default_rng(num)
    values = np.sort(random.exponential(100.0, 400))
    lives = Lifetimes(values, np.full(400, 1 / 400))
    low, high = (lives.spread(num, None, None, side * RANGE_SIGMAS) for side in (-1.0, 1.0))
    drawn = random.choice(values, (1000, num))
    for of in (np.max, np.sum):
        seen = of(drawn, axis=1)
        within = (of(low) <= seen) & (seen <= of(high))
        assert 0.72 < within.mean() < 0.93


# -- cost --------------------------------------------------------------------------------------


def test_the_derivatives_are_those_of_the_function() -> None:
    random = np.random.default_rng(3)
    steps = Steps(*random.uniform(1, 50, (6, 5)))
    theta = np.append(random.normal(-5, 1, 6), 0.3)
    value, slopes = cost._step_seconds_and_slopes(theta, steps)
    for place in range(7):
        moved = theta.copy()
        moved[place] += 1e-6
        slope = (cost.step_seconds(moved, steps) - value) / 1e-6
        assert slopes[place] == pytest.approx(slope, rel=1e-3, abs=1e-9)


# -- recordings --------------------------------------------------------------------------------


def test_a_run_leaves_what_the_next_forecast_needs() -> None:
    recording = Recording(kv_cache_tokens=1000)
    for number in range(100):
        recording.finish("chat", 64, prompt_tokens=100, output_tokens=number % 64 + 1)
    recording.finish("embed", None, prompt_tokens=700, output_tokens=0, cached_tokens=80)
    readings = [
        Reading(5.0, 8, 0, 1000, 200, 400, 0.5),
        Reading(6.0, 8, 0, 1500, 300, 800, 0.5),
        Reading(7.0, 8, 0, 1500, 300, 1200, 0.7),
    ]
    for reading in readings:
        recording.read(reading)
    recording.reset()
    recording.read(Reading(100.0, 8))
    recording.read(Reading(101.0, 8, 0, 0, 0, 80, 0.1))
    steps = recording.steps
    assert sum(one.seconds for one in steps) == pytest.approx(3)
    assert sum(one.decode_tokens for one in steps) == 880
    assert sum(one.prefill_tokens for one in steps) == 400
    assert sum(one.num_steps for one in steps) == pytest.approx(110)

    record = record_from_run(
        batch_id="batch_1",
        model="m",
        engine="vllm",
        engine_version="1",
        device="gpu",
        device_name="a card",
        num_requests=101,
        success_count=101,
        load_s=3,
        inference_s=10,
        prompt_tokens=10_700,
        completion_tokens=3000,
        engine_args={"max_num_seqs": 8, "kv_cache_tokens": 1000},
        registry_args={"b": 1, "a": [2]},
        machine="here",
        timestamp=NOW,
        recording=recording,
    )
    read = BenchmarkRecord.model_validate_json(record.model_dump_json())
    assert read == record
    measurement = read.measurement()
    assert measurement.limits.max_num_seqs == 8
    assert measurement.cached_tokens == 80
    assert measurement.setting == Setting("m", "a card @ here", "vllm", "1", '{"a":[2],"b":1}')
    assert {group.endpoint for group in measurement.groups} == {"chat", "embed"}
    chat = next(group for group in measurement.groups if group.endpoint == "chat")
    assert chat.num_requests == 100
    assert chat.num_cut == 1
    assert chat.output_quantiles[0] == 1
    assert chat.output_quantiles[-1] == 64
    assert measurement.prompt_quantiles[-1] == pytest.approx(700, rel=0.01)
    assert read.is_representative
    assert not replace_field(read, set_aside="failed").is_representative
    assert replace_field(read, set_aside="failed").measurement().is_outlier


def replace_field(record: BenchmarkRecord, **changes: object) -> BenchmarkRecord:
    return record.model_copy(update=changes)


def test_memory_stays_flat_however_many_lengths_there_are() -> None:
    recording = Recording()
    for number in range(20_000):
        recording.finish(
            "chat", number, prompt_tokens=1 + number * 7 % 100_000, output_tokens=number
        )
    assert len(recording.groups) <= 120
    assert len(recording._prompts) < 2000
    assert sum(len(group.lengths) for group in recording._groups.values()) < 20_000
    quantiles = recording.output_quantiles
    assert quantiles == pytest.approx(sketch(np.arange(20_000)), rel=0.02, abs=2)


def test_forecasters_are_kept_until_a_record_comes(tmp_path: Path) -> None:
    from batch_app.benchmarks import BenchmarkFolder

    folder = BenchmarkFolder(tmp_path)
    folder.write(GUIDE)
    forecasters = Forecasters(folder)
    setting = Setting(GUIDE.model)
    first = forecasters.of(setting)
    assert forecasters.of(setting) is first
    folder.write(GUIDE.model_copy(update={"test_id": "another"}))
    second = forecasters.of(setting)
    assert second is not first
    assert len(second.measurements) == 2
