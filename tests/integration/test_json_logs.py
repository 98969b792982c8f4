"""What is printed. `--log-format json`: each line of server, worker and access log is an object,
with no prompt."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn.config import LOGGING_CONFIG

from batch_app import logs
from batch_app.logs import JsonFormatter
from support.site import Site

KEYS = {"time", "level", "logger", "message", "batch_id"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_everything_said_is_json_and_no_prompt_is_in_it(tmp_path: Path) -> None:
    site = Site(tmp_path, log_format="json", min_free_bytes=0, poll_interval_s=0.2)
    try:
        process = site._start("api_server", "--port", "0", environment={})
        url = ""
        while not url:
            assert process.poll() is None
            out = tmp_path / "api_server.out"
            for line in lines_of(out) if out.exists() and out.read_text().endswith("\n") else ():
                if "Uvicorn running on " in line["message"]:
                    url = line["message"].split("Uvicorn running on ")[1].split()[0]
        worker = site.start_worker()
        secret = "xylophone"
        request = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": secret}]}}
        answer = httpx.post(
            f"{url}/v1/batches",
            data={"model": "sim"},
            files={"file": json.dumps(request).encode()},
            timeout=120,
        )
        batch_id = answer.json()["batch_id"]
        site.wait_until_done(batch_id)
        assert httpx.get(f"{url}/v1/batches/{batch_id}?x=%0aforged", timeout=120).status_code == 200
        httpx.post(
            f"{url}/v1/batches",
            data={"model": secret},
            files={"file": secret.encode()},
            timeout=120,
        )
        for one in (worker, process):
            one.send_signal(signal.SIGTERM)
            assert one.wait(timeout=120) == 0
        server, work = (lines_of(tmp_path / f"{name}.out") for name in ("api_server", "worker"))
        for line in server + work:
            assert set(line) >= KEYS
            assert secret not in json.dumps(line)
        (access,) = [
            line for line in server if line.get("path", "").startswith(f"/v1/batches/{batch_id}")
        ]
        assert (access["method"], access["status"]) == ("GET", 200)
        assert access["batch_id"] == batch_id
        assert [line for line in work if line["batch_id"] == batch_id]
        assert any(line["message"] == "✅ Batch API Server started" for line in server)
    finally:
        site.close()


def test_an_exception_is_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord(
            "batch_app.x", logging.ERROR, "x.py", 1, "of %s\nx", ("b",), sys.exc_info()
        )
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "of b\nx"
    assert line["level"] == "error"
    assert "ValueError: two" in line["exception"]
    assert line["batch_id"] is None


@pytest.mark.parametrize(
    ("method", "path", "status", "is_said"),
    [
        ("GET", f"/v1/batches/batch_{'0' * 24}?format=native", 200, False),
        ("GET", "/v1/batches?limit=1&status=running", 200, False),
        ("GET", "/metrics", 200, False),
        ("GET", "/readyz", 503, True),
        ("GET", f"/v1/batches/batch_{'0' * 24}", 404, True),
        ("GET", f"/v1/batches/batch_{'0' * 24}/results", 200, True),
        ("POST", "/v1/batches", 200, True),
        ("DELETE", f"/v1/batches/batch_{'0' * 24}", 200, True),
    ],
)
def test_polls_that_go_well_do_not_fill_a_terminal(
    method: str, path: str, status: int, is_said: bool
) -> None:
    (name,) = logs.server_config(LOGGING_CONFIG)["loggers"]["uvicorn.access"]["filters"]
    polling = logs.server_config(LOGGING_CONFIG)["filters"][name]["()"]()
    access = ("127.0.0.1:1", method, path, "1.1", status)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, "", access, None)
    assert polling.filter(record) is is_said
