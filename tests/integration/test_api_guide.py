"""The usage guide's calls and answers, field by field."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

import requests

from batch_app.benchmarks import record_from_run
from batch_app.core import BatchStatus, Progress, TokenCounts
from integration.api_fixtures import GUIDE_MODEL, SEED_BENCHMARK, Api, input_file

BATCH_FIELDS = [
    "batch_id",
    "model",
    "status",
    "progress",
    "created_at",
    "started_at",
    "completed_at",
    "throughput_tokens_per_sec",
    "total_tokens",
    "error_message",
    "results_url",
    "estimate",
    "deduplicated",
    "pause_reason",
    "paused",
    "webhook",
    "provenance",
    "input_file_id",
    "usage",
    "finish_reasons",
]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")


def test_models(api: Api) -> None:
    answer = api.get("/v1/models").json()

    assert answer["count"] == len(answer["models"]) == 2
    assert answer["models"][0] == {
        "model": "google/gemma-3-4b-it",
        "platform": "vllm-native",
        "throughput_tokens_per_sec": 2511,
        "throughput_requests_per_sec": 2.29,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "last_benchmark": "2025-10-28T08:40:32Z",
        "success_rate": 100.0,
    }
    assert answer["models"][1]["model"] == "sim"
    assert answer["models"][1]["throughput_tokens_per_sec"] is None


def test_submission_with_requests(api: Api) -> None:
    """As the guide's Python script sends it."""
    answer = requests.post(
        f"{api.url}/v1/batches",
        files={"file": ("batch_100_real.jsonl", input_file(100))},
        data={"model": GUIDE_MODEL},
        timeout=120,
    )

    assert answer.status_code == 200
    batch = answer.json()
    assert list(batch) == BATCH_FIELDS
    assert re.fullmatch(r"batch_[0-9a-f]{24}", batch["batch_id"])
    assert batch["model"] == GUIDE_MODEL
    assert batch["status"] == "pending"
    assert batch["progress"] == {
        "total": 100,
        "completed": 0,
        "failed": 0,
        "truncated": 0,
        "percent": 0.0,
    }
    assert TIME.fullmatch(batch["created_at"])
    created_at = datetime.fromisoformat(batch["created_at"]).replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - created_at) < timedelta(minutes=10)
    unset = {*BATCH_FIELDS[5:11], "pause_reason", "paused", "webhook", "provenance", "usage"}
    assert {name for name in batch if batch[name] is None} == unset
    estimate = batch["estimate"]
    completion = datetime.strptime(estimate.pop("estimated_completion"), "%Y-%m-%dT%H:%M:%S%z")
    own_s = estimate.pop("estimated_seconds")
    assert abs(completion - created_at - timedelta(seconds=own_s)) < timedelta(minutes=1)
    # Its requests are much shorter than the benchmark's, but the model has to be loaded.
    assert 26 < own_s < 75
    assert 10 < estimate.pop("low_s") < own_s + 1  # that load was on another machine
    assert own_s - 1 < estimate.pop("high_s") < 300
    assert 500 < estimate.pop("prompt_tokens") < 5000
    assert 0 < estimate.pop("expected_output_tokens") <= 50_000
    assert estimate.pop("throughput_tokens_per_sec") > 0
    assert estimate.pop("throughput_requests_per_sec") > 0
    assert estimate == {
        "estimated_hours": round(own_s / 3600, 2),
        "based_on_benchmark": SEED_BENCHMARK,
        "queue_wait_s": 0.0,
        "basis": [SEED_BENCHMARK],
        "basis_kind": "similar",
        "prompt_basis": "guess",
    }
    assert api.get(f"/v1/batches/{batch['batch_id']}").json()["status"] == "pending"


def test_alias_and_file_name(api: Api) -> None:
    batch_id = api.submitted(model="gemma")

    batch = api.batch(batch_id)
    assert batch.model == GUIDE_MODEL
    assert api.store.get_file(batch.input_file_id).filename == "batch.jsonl"
    assert api.data.input_file(batch.input_file_id).read_bytes() == input_file(3)
    assert api.data.wakeup_file.exists()


def test_a_batch_may_have_every_request_computed(api: Api) -> None:
    def submit(**fields: str) -> requests.Response:
        return requests.post(
            f"{api.url}/v1/batches",
            files={"file": ("batch.jsonl", input_file(2))},
            data={"model": GUIDE_MODEL} | fields,
            timeout=120,
        )

    assert api.batch(submit(deduplicate="false").json()["batch_id"]).deduplicate is False
    assert api.batch(submit().json()["batch_id"]).deduplicate is True
    refusal = submit(deduplicate="perhaps")
    assert refusal.status_code == 400
    assert refusal.json()["error"]["param"] == "deduplicate"


def test_status_of_running_and_completed(api: Api) -> None:
    batch_id = api.submitted(100)
    now = datetime.now(UTC)
    claimed = api.store.claim_next("worker", 30, now)
    assert claimed is not None
    tokens = TokenCounts(prompt_tokens=40_000, completion_tokens=17_310)
    api.store.renew(claimed, lease_s=30, progress=Progress(49, 1, tokens))

    running = api.get(f"/v1/batches/{batch_id}").json()

    assert list(running) == BATCH_FIELDS
    assert running["status"] == "running"
    assert running["progress"] == {
        "total": 100,
        "completed": 49,
        "failed": 1,
        "truncated": 0,
        "percent": 50.0,
    }
    assert TIME.fullmatch(running["started_at"])
    assert running["completed_at"] is running["results_url"] is None
    # Half of them, and the model is loaded.
    assert running["estimate"]["estimated_seconds"] <= 22

    tokens = TokenCounts(prompt_tokens=80_000, completion_tokens=34_620)
    finalizing = api.store.transition(claimed, BatchStatus.FINALIZING, now)
    api.store.transition(
        finalizing,
        BatchStatus.COMPLETED,
        now,
        progress=Progress(100, 0, tokens),
        throughput_tokens_per_s=2487.4,
    )
    completed = api.get(f"/v1/batches/{batch_id}").json()
    assert completed["status"] == "completed"
    assert completed["progress"] == {
        "total": 100,
        "completed": 100,
        "failed": 0,
        "truncated": 0,
        "percent": 100.0,
    }
    assert TIME.fullmatch(completed["completed_at"])
    assert completed["throughput_tokens_per_sec"] == 2487
    assert completed["total_tokens"] == 114620
    assert completed["results_url"] == f"/v1/batches/{batch_id}/results"
    assert completed["estimate"] is None


def test_a_new_benchmark_is_used_next(api: Api) -> None:
    record = record_from_run(
        batch_id="batch_0123456789abcdef01234567",
        model="sim",
        engine="sim",
        engine_version="1",
        device="cpu",
        device_name="a processor",
        num_requests=200,
        success_count=200,
        load_s=5.0,
        inference_s=100.0,
        prompt_tokens=1000,
        completion_tokens=3000,
        engine_args={"max_model_len": 512},
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    assert api.submit(input_file(10), model="sim").json()["estimate"] is None

    api.services.benchmarks.write(record)

    model = api.get("/v1/models").json()["models"][1]
    assert model["throughput_requests_per_sec"] == 2.0
    assert model["throughput_tokens_per_sec"] == 40
    assert model["last_benchmark"] == "2026-01-02T03:04:05Z"
    assert model["max_model_len"] == 512
    estimate = api.submit(input_file(10), model="sim").json()["estimate"]
    assert estimate["based_on_benchmark"] == record.test_id
    assert 5 <= estimate["estimated_seconds"] < 5 + 100  # no longer than 200 requests took


def test_completion_counts_the_queue_ahead(api: Api) -> None:
    first = api.submit(input_file(1000)).json()["estimate"]
    second = api.submit(input_file(10)).json()["estimate"]
    completion = datetime.strptime(second["estimated_completion"], "%Y-%m-%dT%H:%M:%S%z")
    wait_s = (completion - datetime.now(UTC)).total_seconds()

    assert second["estimated_seconds"] < 26  # it will find the model loaded
    assert abs(second["queue_wait_s"] - first["estimated_seconds"]) < 5
    assert abs(wait_s - second["estimated_seconds"] - second["queue_wait_s"]) < 60
    listed = api.get("/v1/batches").json()["batches"][0]["estimate"]["estimated_completion"]
    again = datetime.strptime(listed, "%Y-%m-%dT%H:%M:%S%z")
    assert abs((again - completion).total_seconds()) < 60


def test_list(api: Api) -> None:
    ids = [api.submitted(1) for _ in range(5)]
    api.call("DELETE", f"/v1/batches/{ids[0]}")

    everything = api.get("/v1/batches").json()
    assert [batch["batch_id"] for batch in everything["batches"]] == ids[::-1]
    assert everything["count"] == 5
    assert everything["has_more"] is False
    pending = api.get("/v1/batches?status=pending").json()
    assert [batch["batch_id"] for batch in pending["batches"]] == ids[:0:-1]
    assert api.get("/v1/batches?status=completed").json()["batches"] == []
    page = api.get("/v1/batches?limit=2").json()
    assert [batch["batch_id"] for batch in page["batches"]] == ids[:2:-1]
    assert page["has_more"] is True
    rest = api.get(f"/v1/batches?limit=4&after={ids[3]}").json()
    assert [batch["batch_id"] for batch in rest["batches"]] == ids[2::-1]
    assert rest["has_more"] is False


def test_status_call_is_quick(api: Api) -> None:
    """Far from a measurement: only that no call takes an obvious detour. In processor time, of the
    client's side too, so that it is no matter what else the machine does."""
    batch_id = api.submitted()
    with requests.Session() as session:
        begin = time.process_time()
        for _ in range(50):
            session.get(f"{api.url}/v1/batches/{batch_id}", timeout=120).raise_for_status()
        mean_s = (time.process_time() - begin) / 50
    assert mean_s < 0.2
