"""The parts of the pages that need no browser: words, groups of failures, charts."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest

from batch_app.core import (
    Batch,
    BatchStatus,
    Dialect,
    FinishReasonCounts,
    Paused,
    PauseKind,
    Progress,
    Sample,
    TokenCounts,
    Waiting,
)
from batch_app.dashboard import charts, device, failures, formats
from batch_app.dashboard.accounts import _end as end_of_key
from batch_app.dashboard.charts import Look, Run, Theme, Width
from batch_app.dashboard.rendering import safe_next
from batch_app.dashboard.views import NO_WORKER, Crew, Line, batch_view, speed_now
from batch_app.errors import BadRequest
from batch_app.estimates import Estimate
from batch_app.files import DataDir
from batch_app.results import ResultsLog
from batch_app.store import WorkerRow
from support.nvml import Card, UseNvml, mig_slice

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
BATCH = Batch(
    id="batch_1",
    dialect=Dialect.NATIVE,
    status=BatchStatus.RUNNING,
    endpoint="/v1/chat/completions",
    model="sim",
    input_file_id="file-1",
    created_at=NOW - timedelta(minutes=5),
    started_at=NOW - timedelta(minutes=1),
    total=100,
    lease_owner="worker_1",
)


def sample(second: float, done: int, tokens: int) -> Sample:
    return Sample(NOW - timedelta(minutes=1) + timedelta(seconds=second), done, 0, tokens)


def worker(**changes: object) -> WorkerRow:
    row = WorkerRow("worker_1", "host", 1, 0.0, NOW, NOW, "working", "sim", "batch_1")
    return replace(row, **changes)  # type: ignore[arg-type]


def note(batch: Batch, *workers: WorkerRow, line: tuple[Waiting, ...] = ()) -> str:
    view = batch_view(
        batch,
        None,
        name="in.jsonl",
        line=Line.of(line),
        crew=Crew(workers),
        samples=(),
        now=NOW,
    )
    return view.note


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "under 1 s"),
        (0.4, "under 1 s"),
        (42, "42 s"),
        (119, "119 s"),
        (720, "12 min"),
        (3600, "1 h"),
        (12000, "3 h 20 min"),
        (86400 * 2 + 3600 * 4, "2 d 4 h"),
    ],
)
def test_durations_are_said_in_two_units_at_most(seconds: float, text: str) -> None:
    assert formats.duration(seconds) == text


def test_ranges_and_numbers() -> None:
    assert formats.between(540, 840) == "9 to 14 min"
    assert formats.between(90, 840) == "90 s to 14 min"
    assert formats.between(601, 610) == "10 min"
    assert [formats.ordinal(n) for n in (1, 2, 3, 4, 11, 22, 113)] == [
        "1st",
        "2nd",
        "3rd",
        "4th",
        "11th",
        "22nd",
        "113th",
    ]
    assert formats.size(17) == "17 bytes"
    assert formats.size(3 << 30) == "3.0 GiB"


def test_why_a_batch_waits() -> None:
    queued = replace(BATCH, status=BatchStatus.QUEUED, started_at=None, lease_owner=None)
    me = Waiting("batch_1", "sim", 100, place=7)
    others = Waiting("batch_0", "sim", 1200, place=3), Waiting("batch_2", "big", 5, 9, priority=1)
    assert note(queued) == NO_WORKER
    assert note(queued, worker(), line=(me, *others)) == (
        "3rd in line, behind 2 batches with 1,205 requests."
    )
    assert note(queued, worker(), line=(me,)) == "Next in line, when the running batch has ended."
    idle = worker(state="idle", model="big", batch_id=None)
    assert note(queued, idle, line=(me,)) == "Next in line; sim has to be loaded."
    full = Paused(PauseKind.DISK, "No space left.", NOW)
    assert note(replace(queued, paused=full), worker()) == "Paused: No space left."
    away = Paused(PauseKind.HUB, "It is away.", NOW, retry_at=NOW, model="sim", entry="x")
    assert note(replace(queued, paused=away)) == (
        f"Paused: It is away. Next try at {NOW:%H:%M:%S} UTC."
    )
    rejected = replace(away, kind=PauseKind.REGISTRY, reason="No.", retry_at=None)
    assert "again when the registry's entry of sim changes" in note(
        replace(queued, paused=rejected)
    )
    assert note(BATCH, worker(model=None)) == "Loading sim."
    assert note(BATCH) == f"Its worker is gone. {NO_WORKER}"
    assert note(replace(BATCH, progress=Progress(3)), worker()) == ""


def test_a_silent_worker_is_not_counted() -> None:
    silent = worker(heartbeat_at=NOW - timedelta(seconds=16))
    assert Crew.of([silent], 5.0, NOW).alive == ()
    assert Crew.of([worker()], 5.0, NOW).text == "Worker busy"


def test_the_range_of_an_estimate_is_shown_where_there_is_one() -> None:
    done_at = NOW + timedelta(seconds=900)
    estimate = Estimate(600, done_at, 1.0, 1.0, "a", low_s=480.0, high_s=780.0)
    options = {"name": "", "line": Line(), "crew": Crew(), "samples": (), "now": NOW}
    view = batch_view(BATCH, estimate, **options)  # type: ignore[arg-type]
    assert view.eta == "about 15 min (13 to 18 min)", "what runs before it counts"
    assert view.done_at == "2026-01-01T12:15:00Z"
    narrow = replace(estimate, low_s=599.0, high_s=601.0)
    assert batch_view(BATCH, narrow, **options).eta == "about 15 min"  # type: ignore[arg-type]
    assert view.name == "batch_1", "a file without a name"


def test_the_present_speed_leaves_out_loading() -> None:
    loading = [sample(second, 0, 0) for second in range(5)]
    assert speed_now(BATCH, [*loading, sample(5, 1, 100), sample(6, 2, 200)], NOW) == 100
    long = [sample(60 * n, 10 * n, 6000 * n) for n in range(10)]
    assert speed_now(BATCH, long, NOW) == 100
    assert speed_now(replace(BATCH, status=BatchStatus.COMPLETED), long, NOW) is None
    assert speed_now(BATCH, loading[:1], NOW) is None


def test_before_the_first_result_the_speed_is_the_engine_s() -> None:
    engine = {"prompt_tokens_per_s": 40.0, "generation_tokens_per_s": 463.4, "num_running": 9.0}
    options = {"name": "", "line": Line(), "samples": (), "now": NOW}
    for one, speed in [
        (worker(engine=engine), "503 tokens/s"),
        (worker(engine=engine, batch_id="batch_2"), ""),
        (worker(engine=engine, model="other"), ""),
        (worker(), ""),
    ]:
        view = batch_view(BATCH, None, crew=Crew((one,)), **options)  # type: ignore[arg-type]
        assert view.speed == speed
    queued = replace(BATCH, status=BatchStatus.QUEUED)
    view = batch_view(queued, None, crew=Crew((worker(engine=engine),)), **options)  # type: ignore[arg-type]
    assert view.speed == ""


def test_a_batch_of_failures_alone_does_not_look_well() -> None:
    options = {"name": "", "line": Line(), "crew": Crew(), "samples": (), "now": NOW}
    ended = replace(BATCH, status=BatchStatus.COMPLETED, progress=Progress(99, 1))
    view = batch_view(ended, None, **options)  # type: ignore[arg-type]
    assert (view.label, view.is_bad) == ("Completed", False)
    view = batch_view(replace(ended, progress=Progress(0, 100)), None, **options)  # type: ignore[arg-type]
    assert (view.label, view.is_bad) == ("All failed", True)


def test_a_batch_of_truncated_answers_says_so() -> None:
    options = {"name": "", "line": Line(), "crew": Crew(), "samples": (), "now": NOW}
    for status in (BatchStatus.RUNNING, BatchStatus.COMPLETED):
        progress = Progress(3000, finish_reasons=FinishReasonCounts(length=3000))
        batch = replace(BATCH, status=status, total=3000, progress=progress)
        view = batch_view(batch, None, **options)  # type: ignore[arg-type]
        assert view.truncated == "3,000 cut off at max_tokens"
    view = batch_view(replace(batch, progress=Progress(3000)), None, **options)  # type: ignore[arg-type]
    assert view.truncated == ""


# -- failures --------------------------------------------------------------------------------------


def failed_line(custom_id: str, code: object, message: str, status: int = 400) -> bytes:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": code}
    response = {"status_code": status, "request_id": "r", "body": {"error": error}}
    line = {"id": "x", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line).encode()


def test_failures_are_grouped_but_for_their_numbers() -> None:
    good = b'{"custom_id":"g","response":{"status_code":200,"body":{}},"error":null}'
    cancelled = json.dumps(
        {"custom_id": "c", "response": None, "error": {"code": "batch_cancelled", "message": "m"}}
    ).encode()
    lines = [good, cancelled]
    lines += [failed_line(f"a{n}", 400, f"Too long: {n} tokens of 'x{n}'.") for n in range(5)]
    lines += [failed_line("b\u202e", "other", "Broken.", 500), b'{"custom_id":"n","response":null}']
    found = failures.grouped(lines)
    assert not found.is_partial
    assert found.num_read == 8
    first = found.groups[0]
    assert (first.count, first.code, first.status) == (5, "BadRequestError", 400)
    assert (first.custom_id, first.message) == ("a0", "Too long: 0 tokens of 'x0'.")
    assert {group.code for group in found.groups[1:]} == {"batch_cancelled", "other", "unknown"}
    assert "b\\u202e" in {group.custom_id for group in found.groups}


def test_what_is_read_of_failures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MAX_FAILURES", 10)
    monkeypatch.setattr(failures, "MAX_GROUPS", 3)
    found = failures.grouped(failed_line("a", f"code{n:c}", "m") for n in range(65, 90))
    assert found.is_partial
    assert found.num_read == 10
    assert next(group.code for group in found.groups) == "others"
    assert sum(group.count for group in found.groups) == 10
    assert len(found.groups) == 4


class Reads:
    """A reader of failures, in a folder of its own; counts how often it reads. Its clock stands."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = DataDir(root)
        self.data.create()
        self.now = 0.0
        self.num = 0
        self.reader = failures.FailureReader(self.data, lambda: self.now)
        really = failures.grouped

        def counted(lines: Iterable[bytes]) -> failures.Failures:
            self.num += 1
            return really(lines)

        monkeypatch.setattr(failures, "grouped", counted)

    def ended(self, number: int = 1) -> Batch:
        self.data.output_file(f"file-{number}").write_bytes(failed_line("a", "x", "m") + b"\n")
        return replace(
            BATCH,
            id=f"batch_{number}",
            status=BatchStatus.COMPLETED,
            error_file_id=f"file-{number}",
            progress=Progress(99, 1),
        )

    def running(self, failed: int) -> Batch:
        work_dir = self.data.work_dir(BATCH.id)
        work_dir.mkdir(exist_ok=True)
        log = ResultsLog(work_dir, 100, epoch=failed)
        for number in range(failed):
            log.append(number, 400, TokenCounts(), failed_line(f"r{number}", "x", "m"))
        log.commit()
        log.close()
        return replace(BATCH, progress=Progress(0, failed))


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(tmp_path, monkeypatch)


def test_failures_of_an_ended_batch_are_read_once_and_go_with_its_file(reads: Reads) -> None:
    batch = reads.ended()
    for _ in range(3):
        assert [group.custom_id for group in reads.reader.of(batch).groups] == ["a"]
        reads.now += 10_000
    assert reads.num == 1
    reads.data.output_file("file-1").unlink()
    assert reads.reader.of(batch) == failures.NONE
    assert reads.reader._read == {}


def test_failures_of_a_running_batch_are_read_again_when_there_are_more(reads: Reads) -> None:
    assert reads.reader.of(BATCH) == failures.NONE
    assert reads.reader.of(reads.running(2)).num_read == 2
    reads.now += failures.READ_EVERY_S + 1
    reads.reader.of(reads.running(2))
    assert reads.num == 1, "no new ones"
    reads.reader.of(reads.running(3))
    assert reads.num == 2
    assert reads.reader.of(reads.running(5)).num_read == 3, "not yet again"
    assert reads.num == 2
    reads.now += failures.READ_EVERY_S
    assert reads.reader.of(reads.running(5)).num_read == 5


def test_of_many_batches_the_oldest_is_forgotten(
    reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "MAX_REMEMBERED", 2)
    first, second, third = (reads.ended(number) for number in (1, 2, 3))
    for batch in (first, second, first, third, first):
        reads.reader.of(batch)
    assert reads.num == 3
    reads.reader.of(second)
    assert reads.num == 4


# -- charts ----------------------------------------------------------------------------------------


def test_the_pace_keeps_every_token() -> None:
    samples = [sample(second, second, 100 * second) for second in range(1, 200)]
    pace = charts.pace_of(BATCH, samples)
    assert len(pace.points) == charts.MAX_POINTS
    assert all(speed == pytest.approx(100) for _, speed in pace.points)
    assert "100 to 100 tokens per second" in pace.text
    assert charts.pace_of(BATCH, []).points == ()
    assert charts.pace_of(replace(BATCH, started_at=None), samples).points == ()


def test_the_pace_ends_where_the_work_did() -> None:
    samples = [sample(second, second, 100 * second) for second in range(1, 11)]
    start = BATCH.started_at or NOW
    done = replace(
        BATCH,
        status=BatchStatus.COMPLETED,
        finalizing_at=start + timedelta(seconds=12),
        completed_at=start + timedelta(seconds=500),
        progress=Progress(12, tokens=TokenCounts(600, 600)),
    )
    pace = charts.pace_of(done, samples)
    assert pace.points[-1][0] == 12
    assert sum(speed for _, speed in pace.points) * 12 / len(pace.points) == pytest.approx(1200)


@pytest.mark.parametrize("theme", Theme)
@pytest.mark.parametrize("width", Width)
def test_charts_are_plain_svg(theme: Theme, width: Width) -> None:
    look = Look(theme, width)
    pace = charts.pace_of(BATCH, [sample(n, n, n * n) for n in range(1, 30)])
    runs = [Run(100.0 * n, 110.0 * n, NOW, 10, True) for n in range(1, 5)]
    for drawn in (
        charts.draw_pace(pace, look),
        charts.draw_pace(charts.Pace(()), look),
        charts.draw_accuracy(runs, look),
        charts.draw_accuracy([], look),
    ):
        tags = {element.tag for element in ElementTree.fromstring(drawn).iter()}
        assert "{http://www.w3.org/2000/svg}svg" in tags
        assert not {tag for tag in tags if tag.endswith(("script", "image", "foreignObject"))}
    assert "within 10% of the prediction" in charts.accuracy_text(runs)
    assert charts.accuracy_text(runs[:1]) == "One run so far: its prediction was off by 10%."


def test_where_no_token_came_there_is_no_chart() -> None:
    assert charts.pace_of(BATCH, [sample(n, n, 0) for n in range(1, 9)]).points == ()


def test_the_processors_share_is_right_whichever_thread_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil's own figure begins anew, with 0, in each thread."""
    times = namedtuple("times", "user idle iowait guest")
    monkeypatch.setattr(device, "READ_EVERY_S", 0.0)
    clock = iter([times(0, 0, 0, 0), times(6, 3, 1, 5), times(6, 3, 1, 5), times(7, 6, 1, 6)])
    monkeypatch.setattr(device.psutil, "cpu_times", lambda: next(clock))
    reads = device.Device(tmp_path)

    def shown() -> str:
        with ThreadPoolExecutor(1) as fresh:
            return fresh.submit(reads.read).result().as_event()["cpu"]["text"]

    assert [shown(), shown(), shown()] == ["60%", "60%", "25%"]


def test_each_gpu_has_the_gauges_that_it_answers_for(tmp_path: Path, use_nvml: UseNvml) -> None:
    use_nvml(Card(), Card("GPU-2", "NVIDIA GB10", total=None, busy=None, milliwatts=None))
    reading = device.Device(tmp_path).read()
    assert [part.name for part in reading.parts][:2] == [
        "NVIDIA GeForce RTX 4080",
        "NVIDIA GB10 (1)",
    ]
    shown = {key: body["text"] for key, body in reading.as_event().items() if "gpu" in key}
    assert shown == {
        "gpu0_memory": "1.0 GiB of 16.0 GiB",
        "gpu0_busy": "50%",
        "gpu0_temperature": "61 °C",
        "gpu0_power": "250 W",
        "gpu1_temperature": "61 °C",
    }


def test_the_dashboard_shows_the_gpus_that_are_visible(
    tmp_path: Path, use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use_nvml(Card("GPU-1"), Card("GPU-2", "NVIDIA H200", slices=[mig_slice("MIG-1")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    shown = device.Device(tmp_path)
    assert [part.name for part in shown.read().parts][:-1] == ["NVIDIA H200 MIG 1g.18gb"]
    assert fake.initialised == 1, "it is asked every second, so it stays open"


def test_after_a_sign_in_nobody_is_sent_elsewhere() -> None:
    for target in ("//evil.example", "https://evil.example", "/\\evil.example", "", "/a\nb", "x"):
        assert safe_next(target) == "/"
    assert safe_next("/batches/batch_1?x=1") == "/batches/batch_1?x=1"


@pytest.mark.parametrize("days", ["0", "3651", "-1", "1.5", "٣", "365000000", "0" * 5000 + "1"])
def test_a_key_ends_within_ten_years_or_never(days: str) -> None:
    with pytest.raises(BadRequest, match="1 to 3650 days"):
        end_of_key(NOW, days)
    assert end_of_key(NOW, "3650") == NOW + timedelta(days=3650)
    assert end_of_key(NOW, "") is None
