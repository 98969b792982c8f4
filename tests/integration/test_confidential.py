"""What was asked stays out of the logs, and the engine within reach of nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from batch_app.core import BatchStatus
from support.site import ENDLESS, Site, echo_line, engine_pid, kill_tree
from support.waiting import wait_for

MARK = "zebra-crossing-at-midnight"
#: Where prompts and answers belong.
CONTENT = ("input", "output", "active", "incoming")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(
        tmp_path, heartbeat_s=0.3, poll_interval_s=0.2, engine_backoff_s=0.01, engine_hang_s=1.0
    )
    yield site
    site.close()


def marked(number: int, text: str = "", **body: Any) -> dict[str, Any]:
    line = echo_line(number, **body)
    line["body"]["messages"][0]["content"] = f"{MARK} {text}"
    return line


def places_with_the_mark(root: Path) -> list[str]:
    """Every file but those of prompts and answers."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file()
        and not set(path.relative_to(root).parts) & set(CONTENT)
        and MARK.encode() in path.read_bytes()
    ]


BAD_LINES: list[bytes] = [
    b'{"custom_id": "a", "body": {"messages": "%b"}}',
    b'{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "%b}]}}',
    b'{"custom_id": "a", "body": {"messages": [{"role": "user", "content": {"%b": 1}}]}}',
    b'{"custom_id": "a", "body": {"messages": [{"role": "user"}], "temperature": "%b"}}',
    b'{"custom_id": "a", "body": {"messages": [{"role": "user"}], "chat_template": "%b"}}',
    b'{"custom_id": "a", "body": {"messages": [{"role": "user"}], "stop": ["%b", 1]}}',
    b"%b",
    b'{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "%b\xff"}]}}',
]


def test_no_prompt_in_any_log(site: Site, tmp_path: Path) -> None:
    """Through API server, worker and engine, with every failure that the simulated engine has."""
    url = site.start_server()
    site.start_worker()

    def submit(name: str, content: bytes) -> requests.Response:
        return requests.post(
            f"{url}/v1/batches", files={"file": content}, data={"model": name}, timeout=120
        )

    for raw in BAD_LINES:
        assert submit("sim", raw.replace(b"%b", MARK.encode())).status_code == 400
    file = requests.post(
        f"{url}/v1/files",
        files={"file": BAD_LINES[0].replace(b"%b", MARK.encode())},
        data={"purpose": "batch"},
        timeout=120,
    ).json()
    refused = requests.post(
        f"{url}/v1/batches",
        json={
            "input_file_id": file["id"],
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
        timeout=120,
    ).json()
    assert site.wait_until_done(refused["id"]).status is BatchStatus.FAILED

    good = site.submit([marked(n) for n in range(50)], "sim")
    too_long = site.submit([marked(n, "word " * 20) for n in range(5)], "tiny-context")
    poisonous = site.submit([marked(n, "arsenic" if n == 5 else "") for n in range(20)], "delicate")
    deadly = site.submit([marked(n) for n in range(400)], "mortal")
    unloadable = site.submit([marked(0)], "unloadable")

    assert site.wait_until_done(good).progress.completed == 50
    assert site.wait_until_done(too_long).progress.failed == 5
    assert site.wait_until_done(poisonous).progress.failed == 1
    site.wait_until_done(deadly)
    wait_for(lambda: site.batch(unloadable).paused, what="it waits for its entry to change")
    # The words are there, where they belong; and the logs are not just empty.
    assert any(MARK.encode() in path.read_bytes() for path in site.data.batches.rglob("*.jsonl"))
    assert all(site.log(each) for each in (good, too_long, poisonous, deadly, unloadable))
    assert site.worker_output()
    assert places_with_the_mark(tmp_path) == []


def test_the_engine_listens_on_no_port(site: Site) -> None:
    batch_id = site.submit([echo_line(n) for n in range(ENDLESS)], "endless")
    worker = site.start_worker()
    site.wait_for_progress(batch_id, 1)
    for pid in (worker.pid, engine_pid(worker.pid)):
        connections = psutil.Process(pid).net_connections(kind="inet")
        assert [each for each in connections if each.status == psutil.CONN_LISTEN] == []
    kill_tree(worker.pid)
    wait_for(lambda: worker.poll() is not None, what="the worker is gone")
