"""Whatever a server answers goes through every stage that works on outcomes, and through what
reads the published results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_app.batch_log import BatchLog
from batch_app.client.answers import write_answers
from batch_app.client.results import result_of
from batch_app.config import load_settings
from batch_app.copies import logged_outcome
from batch_app.core import Batch
from batch_app.dashboard.failures import grouped
from batch_app.engine.base import EngineStats, ModelSpec, Outcome
from batch_app.engine.channel import Finished, Reading, from_engine_decoder
from batch_app.engine.openai import OpenAIEngine
from batch_app.files import DataDir
from batch_app.finalize import publish
from batch_app.forecast.live import LiveForecast
from batch_app.forecast.workload import RequestGroup, Workload
from batch_app.index import Index
from batch_app.intake import IntakeRules, index_file
from batch_app.keeper import Delivery, Keeper, failure_reason
from batch_app.measuring import Tally, reading_of
from batch_app.registry import ModelRegistry
from batch_app.results import ResultsLog
from batch_app.routes.downloads import has_failed
from batch_app.wire.lines import as_run_batch
from contract.engine_conformance import chat, collect_all
from support.batches import running_batch
from support.raw_server import RawRequest, http_answer, raw_serving
from support.site import echo_line

MOST = 6

numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([-1, -35, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, 10**400, 1e308, -1e308])
)
leaves = st.none() | st.booleans() | numbers | st.text() | st.just("\ud83d")
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
details = st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens"]), numbers | values)
usages = st.dictionaries(
    st.sampled_from(["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens"]),
    numbers | values,
) | st.fixed_dictionaries({"prompt_tokens_details": details, "completion_tokens_details": details})
answers = st.fixed_dictionaries(
    {"choices": st.just([{"message": {"content": "x"}}]) | values},
    optional={"usage": usages | values, "error": values, "model": values, "id": values},
)
raw_bodies = st.one_of(
    answers.map(lambda value: json.dumps(value).encode()),
    values.map(lambda value: json.dumps(value, ensure_ascii=True).encode()),
    st.binary(),
    st.integers(1, 1500).map(
        lambda depth: b'{"choices":[{"a":' + b"[" * depth + b"]" * depth + b"}]}"
    ),
    st.integers(1, 200_000).map(lambda size: b'{"choices":[{"text":"' + b"x" * size + b'"}]}'),
)
STATUSES = ["200 OK"] * 6 + ["201 Created", "204 No Content", "302 Found", "400 Bad", "599 Odd"]


@dataclass
class Engine:
    """An engine on a server that answers each request with what stands here under its prompt."""

    engine: OpenAIEngine
    answers: dict[str, tuple[str, bytes]]


@pytest.fixture(scope="module")
def remote() -> Iterator[Engine]:
    answers: dict[str, tuple[str, bytes]] = {}

    async def answer(request: RawRequest) -> None:
        status, body = answers.pop(request.prompt, ("200 OK", request.said()))
        await asyncio.sleep(0)
        await request.write(http_answer(body, status))

    with raw_serving(answer) as server:
        args = {"base_url": server.base_url, "max_retries": 0, "backoff_s": 0.001}
        spec = ModelSpec(name="ours", engine="openai", source="served-name", engine_args=args)
        engine = OpenAIEngine(spec)
        engine.load()
        yield Engine(engine, answers)
        engine.close()


def outcomes_of(remote: Engine, answered: list[tuple[str, bytes]]) -> list[Outcome]:
    remote.answers.update({f"odd {n}": answer for n, answer in enumerate(answered)})
    numbers = range(len(answered))
    remote.engine.submit([chat(number, f"odd {number}") for number in numbers])
    found = collect_all(remote.engine, numbers)
    return [found[number] for number in numbers]


def over_the_channel(remote: Engine, outcomes: list[Outcome]) -> tuple[list[Outcome], EngineStats]:
    encoder = msgspec.msgpack.Encoder()
    finished = from_engine_decoder.decode(encoder.encode(Finished(outcomes)))
    reading = from_engine_decoder.decode(encoder.encode(Reading(remote.engine.stats())))
    assert isinstance(finished, Finished)
    assert isinstance(reading, Reading)
    return finished.outcomes, reading.stats


def a_batch_on_disk(root: Path, num: int) -> tuple[Batch, DataDir, Index]:
    (root / "models.toml").write_text('[[model]]\nname = "m"\nsource = "sim"\nengine = "sim"\n')
    data = DataDir(root / "data")
    data.create()
    batch = running_batch(num)
    lines = [orjson.dumps(echo_line(number)) + b"\n" for number in range(num)]
    data.input_file(batch.input_file_id).write_bytes(b"".join(lines))
    folder = data.work_dir(batch.id)
    folder.mkdir(parents=True)
    rules = IntakeRules(ModelRegistry.load(root / "models.toml"), model="m")
    index_file(data.input_file(batch.input_file_id), folder, rules)
    return batch, data, Index.load(folder)


@given(st.lists(st.tuples(st.sampled_from(STATUSES), raw_bodies), min_size=1, max_size=MOST))
@settings(max_examples=80)
def test_any_answer_goes_through_every_stage(
    remote: Engine,
    tmp_path_factory: pytest.TempPathFactory,
    answered: list[tuple[str, bytes]],
) -> None:
    num = len(answered)
    outcomes, stats = over_the_channel(remote, outcomes_of(remote, answered))
    assert [one.number for one in outcomes] == list(range(num))

    root = tmp_path_factory.mktemp("stages")
    batch, data, index = a_batch_on_disk(root, num)
    tally = Tally(index)
    tally.read(stats)
    tally.add(outcomes)
    later = msgspec.structs.replace(stats, at_s=stats.at_s + 1)
    tally.read(later)
    group = RequestGroup(num, max_tokens=100, prompt_tokens=10.0 * num)
    live = LiveForecast(None, Workload((group,)))
    live.read(reading_of(stats))
    for one in outcomes[1:]:
        live.finish(one.number, one.completion_tokens, one.prompt_tokens, one.cached_tokens)
    live.read(reading_of(later))
    live.remaining()

    log = ResultsLog(data.work_dir(batch.id), num, epoch=1)
    keeper = Keeper(
        store=None,  # type: ignore[arg-type]
        batch=batch,
        log=log,
        batch_log=BatchLog(root / "log"),
        settings=load_settings(data_dir=root),
    )
    keeper._commit([Delivery(f"r{one.number}", one) for one in outcomes])
    assert log.progress.done == num
    for one in outcomes:
        assert logged_outcome(log, one.number).status_code == one.status_code
        failure_reason(one)
    published = publish(data, batch, index, log, None, batch.created_at)
    log.close()
    assert published.files
    reread = ResultsLog(data.work_dir(batch.id), num, epoch=2)
    assert (reread.num_damaged, reread.progress) == (0, log.progress)
    reread.close()

    lines = data.results_file(batch).read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["custom_id"] for line in lines] == [f"r{n}" for n in range(num)]
    assert grouped(lines).num_read == sum(map(has_failed, lines))
    for line in lines:
        orjson.loads(as_run_batch(line))
    for kind in ("csv", "parquet"):
        target = root / f"table.{kind}"
        assert write_answers(target, lambda: map(result_of, lines)).num_rows == num
