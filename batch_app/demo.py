"""`make demo`: the whole way of a batch, on this machine, in one command.

Starts API server and worker, submits the shipped example, shows the progress, downloads the results
and stops what it started. The last line of its output names the results file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EXAMPLE = Path("batch_100_real.jsonl")
MODEL = "demo"
DATA_DIR = Path("data/demo")
START_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 600.0
POLL_S = 0.3
NUM_SHOWN = 5

console = Console(highlight=False, soft_wrap=True)


class DemoFailed(Exception):
    """Something of the demo went wrong; the message says what."""


def main() -> int:
    log_path = DATA_DIR / "server.log"
    try:
        if not EXAMPLE.exists():
            raise DemoFailed(f"{EXAMPLE} is not here: run this from the project's folder.")
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        with _servers(log_path) as url, httpx.Client(base_url=url, timeout=60.0) as client:
            batch = _submit(client)
            batch = _watch(client, batch["batch_id"])
            if batch["status"] != "completed":
                raise DemoFailed(f"The batch is {batch['status']}: {batch['error_message']}")
            results = _download(client, batch)
    except (DemoFailed, httpx.HTTPError) as error:
        console.print(f"The demo did not work: {error}", style="bold red", markup=False)
        if log_path.exists():
            console.print(f"The end of {log_path}:", markup=False)
            tail = log_path.read_text(errors="replace").splitlines()[-15:]
            console.print("\n".join(tail), markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130
    _show_answers(results)
    sys.stdout.write(f"Results: {results}\n")
    return 0


@contextlib.contextmanager
def _servers(log_path: Path) -> Iterator[str]:
    """API server and worker on a free port, for as long as the block lasts. Yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    console.print(f"Starting API server (port {port}) and worker …")
    command = [sys.executable, "-m", "batch_app.cli", "up", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--data-dir", str(DATA_DIR)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with exit code {process.returncode}.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5.0).status_code == httpx.codes.OK:
                return
        time.sleep(POLL_S)
    raise DemoFailed(f"the server did not answer within {START_TIMEOUT_S:.0f} s.")


def _submit(client: httpx.Client) -> dict[str, Any]:
    with EXAMPLE.open("rb") as file:
        answer = client.post("/v1/batches", files={"file": file}, data={"model": MODEL})
    if answer.status_code != httpx.codes.OK:
        raise DemoFailed(f"the batch was refused: {answer.text}")
    batch: dict[str, Any] = answer.json()
    console.print(f"Submitted {EXAMPLE} as {batch['batch_id']}, model {MODEL}.")
    if batch["estimate"]:
        console.print(f"Estimated: {batch['estimate']['estimated_seconds']} s.")
    return batch


def _watch(client: httpx.Client, batch_id: str) -> dict[str, Any]:
    """Follow the batch to its end, with a bar that moves. Returns it as it ended."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    deadline = time.monotonic() + RUN_TIMEOUT_S
    with bar:
        task = bar.add_task("waiting for the worker", total=None)
        while time.monotonic() < deadline:
            batch: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
            progress = batch["progress"]
            done = progress["completed"] + progress["failed"]
            description = batch["status"]
            if description == "running" and not done:
                description = "loading the model"
            bar.update(task, description=description, total=progress["total"], completed=done)
            if batch["status"] not in ("pending", "running"):
                return batch
            time.sleep(POLL_S)
    raise DemoFailed(f"the batch was not done within {RUN_TIMEOUT_S:.0f} s.")


def _download(client: httpx.Client, batch: dict[str, Any]) -> Path:
    target = DATA_DIR / f"{batch['batch_id']}_results.jsonl"
    with client.stream("GET", batch["results_url"]) as answer, target.open("wb") as file:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            file.write(chunk)
    return target


def _show_answers(results: Path) -> None:
    with EXAMPLE.open("rb") as questions, results.open("rb") as answers:
        pairs = list(zip(questions, answers, strict=True))
    console.print(f"{len(pairs)} answers. The first {NUM_SHOWN}:")
    for question, answer in pairs[:NUM_SHOWN]:
        asked = orjson.loads(question)["body"]["messages"][-1]["content"]
        line = orjson.loads(answer)
        said = line["response"]["body"]["choices"][0]["message"]["content"]
        console.print(f"  {line['custom_id']}: {asked} → {said}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
