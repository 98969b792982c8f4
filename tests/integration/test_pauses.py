"""What a change of configuration or environment can mend costs a batch time, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_app.core import Batch, BatchStatus, PauseKind
from support.hub import HubStub
from support.sdk import CHAT, jsonl, line, lines
from support.site import Site, assert_answers_echo, echo_line
from support.waiting import PATIENCE_S, wait_for

TYPO = '\n[[model]]\nname = "a typo\n'


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path,
        lease_s=5.0,
        heartbeat_s=0.2,
        poll_interval_s=0.2,
        commit_interval_s=0.05,
        min_free_bytes=0,
        pause_first_s=0.1,
        pause_longest_s=0.4,
    )
    yield site
    site.close()


@pytest.fixture
def hub() -> Iterator[HubStub]:
    hub = HubStub()
    yield hub
    hub.stop()


def get(url: str, path: str) -> dict[str, Any]:
    body: dict[str, Any] = httpx.get(f"{url}{path}", timeout=PATIENCE_S).json()
    return body


def paused(site: Site, batch_id: str, kind: PauseKind) -> Batch:
    def look() -> Batch | None:
        batch = site.batch(batch_id)
        return batch if batch.paused and batch.paused.kind is kind else None

    found = wait_for(look, what=lambda: f"a pause ({kind})\n{site.log(batch_id)}")
    assert found
    return found


def add_model(site: Site, name: str, **arguments: Any) -> None:
    with site.settings.models.open("a") as registry:
        registry.write(f'\n[[model]]\nname = "{name}"\nengine = "sim"\nsource = "org/{name}"\n')
        registry.write("[model.engine_args]\n")
        registry.writelines(f"{key} = {str(value).lower()}\n" for key, value in arguments.items())


def test_a_typo_in_the_registry_stops_nothing_and_is_told(site: Site) -> None:
    good = site.settings.models.read_text()
    batch_ids = [site.submit((echo_line(n) for n in range(60)), "slow") for _ in range(2)]
    url = site.start_server()
    site.start_worker()
    site.wait_for_progress(batch_ids[0], 1)
    site.settings.models.write_text(good + TYPO)
    health = get(url, "/health")
    number = len((good + TYPO).splitlines())
    assert health["status"] == "degraded"
    assert f"at line {number}" in health["checks"]["registry"]
    assert "The last version that could be read stays in use." in health["checks"]["registry"]
    assert get(url, "/readyz")["status"] == "ok"
    assert f"at line {number}" in httpx.get(f"{url}/models", timeout=PATIENCE_S).text

    answer = httpx.post(
        f"{url}/v1/batches",
        files={"file": ("in.jsonl", jsonl(echo_line(n) for n in range(3)))},
        data={"model": "sim"},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 200, answer.text
    for batch_id in (*batch_ids, answer.json()["batch_id"]):
        assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert "Paused" not in site.log(batch_id)
    assert site.worker_output().count("is not valid TOML") == 1
    site.settings.models.write_text(good)
    assert get(url, "/health")["checks"]["registry"] == "ok"


def test_a_model_that_is_taken_out_is_waited_for(site: Site) -> None:
    good = site.settings.models.read_text()
    add_model(site, "late")
    batch_id = site.submit([echo_line(0)], "late")
    site.settings.models.write_text(good)
    url = site.start_server()
    site.start_worker()
    reason = paused(site, batch_id, PauseKind.REGISTRY).pause_reason or ""
    assert "'late' is not in the registry" in reason
    native = get(url, f"/v1/batches/{batch_id}")
    assert (native["status"], native["pause_reason"]) == ("pending", reason)
    said = native["paused"]
    assert (said["kind"], said["reason"], said["by"]) == ("registry", reason, "server")
    assert said["retry_at"] is None
    openai = get(url, f"/v1/batches/{batch_id}?format=openai")
    assert (openai["status"], openai["paused"]["kind"]) == ("in_progress", "registry")
    assert isinstance(openai["paused"]["since"], int)
    listed = get(url, "/v1/batches")
    assert listed["batches"][0]["paused"] == said
    assert listed["data"][0]["paused"] == openai["paused"]
    assert get(url, "/health")["checks"]["batches"] == f"1 paused (1 registry): {reason}"
    assert reason.split("'")[0] in httpx.get(f"{url}/batches/{batch_id}", timeout=PATIENCE_S).text
    add_model(site, "late")
    assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED


def test_a_hub_that_is_away_is_waited_for_and_others_overtake(
    site: Site, hub: HubStub, tmp_path: Path
) -> None:
    add_model(site, "fetched", from_hub=True)
    waits = [site.submit((echo_line(n) for n in range(20)), "fetched") for _ in range(2)]
    other = site.submit((echo_line(n) for n in range(20)), "sim")
    site.start_worker(**hub.environment(tmp_path / "hub"))
    assert site.wait_until_done(other).status is BatchStatus.COMPLETED
    batch = paused(site, waits[0], PauseKind.HUB)
    assert batch.status is BatchStatus.QUEUED
    assert "can't be downloaded at the moment" in (batch.pause_reason or "")
    assert site.batch(waits[1]).pause_kind is PauseKind.HUB, "it would only meet the same"
    assert "Claimed" not in site.log(waits[1])
    hub.start()
    for batch_id in waits:
        assert site.wait_until_done(batch_id).status is BatchStatus.COMPLETED
        assert_answers_echo(site.results(batch_id), 20)
    assert any("fetched" in path for path in hub.paths)


def test_a_failed_batch_without_results_runs_all_of_it_again(site: Site) -> None:
    """Its model wasn't in the registry; now it is."""
    url = site.start_server()
    content = b"\xef\xbb\xbf\n" + jsonl(lines(4, "late")).replace(b"\n", b"\r\n")
    file = httpx.post(
        f"{url}/v1/files",
        files={"file": ("in.jsonl", content)},
        data={"purpose": "batch"},
        timeout=PATIENCE_S,
    ).json()
    wish = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    failed = httpx.post(f"{url}/v1/batches", json=wish, timeout=PATIENCE_S).json()["id"]
    assert site.wait_until_done(failed).status is BatchStatus.FAILED
    again = httpx.post(f"{url}/v1/batches/{failed}/retry", timeout=PATIENCE_S)
    assert again.status_code == 400
    assert again.json()["errors"][0]["code"] == "model_not_found"
    add_model(site, "late")
    again = httpx.post(f"{url}/v1/batches/{failed}/retry", timeout=PATIENCE_S)
    assert again.status_code == 200, again.text
    assert again.json()["request_counts"]["total"] == 4
    site.start_worker()
    done = site.wait_until_done(again.json()["id"])
    assert (done.status, done.retry_of) == (BatchStatus.COMPLETED, failed)
    assert [one["custom_id"] for one in site.results(done.id)] == [
        one["custom_id"] for one in [line(f"r{number}") for number in range(4)]
    ]
