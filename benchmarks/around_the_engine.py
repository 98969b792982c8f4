"""Measures everything around the engine: upload, queue, worker, results log, publication, download.

    python -m benchmarks.around_the_engine --requests 200000 [--json OUT]

Starts API server and worker on a free port with a fresh data folder, runs one batch on the
simulated engine, and meanwhile asks for the batch's status again and again. Checks every answer.
Prints one table: rates, status latency, peak memory of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

REPO = Path(__file__).parents[1]
STATUS_EVERY_S = 0.05
FILLER = "lorem ipsum dolor sit amet " * 40


@dataclass
class Figures:
    num_requests: int
    upload_bytes: int = 0
    upload_s: float = 0.0
    run_s: float = 0.0
    download_s: float = 0.0
    download_gzip_s: float = 0.0
    read_s: float = 0.0
    results_bytes: int = 0
    results_gzip_bytes: int = 0
    status_calls: int = 0
    status_p50_ms: float = 0.0
    status_p99_ms: float = 0.0
    status_max_ms: float = 0.0
    api_peak_mb: float = 0.0
    worker_peak_mb: float = 0.0
    engine_peak_mb: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--prompt-bytes", type=int, default=300, help="filler in each prompt")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-batch-bench-") as folder:
        figures = measure(Path(folder), args.requests, args.prompt_bytes)
    for name, value in asdict(figures).items():
        print(
            f"{name:18} {value:>14,.1f}" if isinstance(value, float) else f"{name:18} {value:>14,}"
        )
    print(f"upload             {figures.upload_bytes / figures.upload_s / 1e6:>14,.1f} MB/s")
    print(
        f"durable results    {figures.num_requests / figures.run_s:>14,.0f} /s (with publication)"
    )
    for name, taken_s in [
        ("download", figures.download_s),
        ("download, gzip", figures.download_gzip_s),
        ("plain read of it", figures.read_s),
    ]:
        print(f"{name:18} {figures.results_bytes / taken_s / 1e6:>14,.1f} MB/s")
    if args.json:
        args.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")
    return 0


def measure(folder: Path, num_requests: int, prompt_bytes: int) -> Figures:
    figures = Figures(num_requests)
    source = folder / "input.jsonl"
    with source.open("w") as file:
        file.writelines(_lines(num_requests, prompt_bytes))
    figures.upload_bytes = source.stat().st_size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "batch_app.cli", "up", "--port", str(port)],
        cwd=REPO,
        env=os.environ
        | {
            "VLLM_BATCH_DATA_DIR": str(folder / "data"),
            "VLLM_BATCH_BENCHMARKS_DIR": str(folder / "benchmarks"),
        },
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    memory = _MemoryWatch(server.pid)
    try:
        _run(f"http://127.0.0.1:{port}", source, folder, figures)
    finally:
        memory.stop()
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    figures.api_peak_mb = memory.peak_mb["api"]
    figures.worker_peak_mb = memory.peak_mb["worker"]
    figures.engine_peak_mb = memory.peak_mb["engine"]
    return figures


def _lines(num_requests: int, prompt_bytes: int) -> Iterator[str]:
    filler = (FILLER * (prompt_bytes // len(FILLER) + 1))[:prompt_bytes]
    for number in range(num_requests):
        body = {
            "messages": [
                {"role": "system", "content": filler},
                {"role": "user", "content": f"say number {number}"},
            ]
        }
        yield json.dumps({"custom_id": f"r{number}", "body": body}) + "\n"


def _run(url: str, source: Path, folder: Path, figures: Figures) -> None:
    with httpx.Client(base_url=url, timeout=600) as client:
        _wait_until_ready(client)
        started = time.perf_counter()
        with source.open("rb") as file:
            answer = client.post("/v1/batches", files={"file": file}, data={"model": "sim"})
        answer.raise_for_status()
        figures.upload_s = time.perf_counter() - started
        batch_id = answer.json()["batch_id"]
        latencies: list[float] = []
        started = time.perf_counter()
        while True:
            asked = time.perf_counter()
            status = client.get(f"/v1/batches/{batch_id}").json()
            latencies.append(time.perf_counter() - asked)
            if status["status"] not in ("pending", "running"):
                break
            time.sleep(STATUS_EVERY_S)
        figures.run_s = time.perf_counter() - started
        if status["status"] != "completed":
            raise SystemExit(f"The batch is {status['status']}: {status['error_message']}")
        results = folder / "results.jsonl"
        url = status["results_url"]
        figures.download_s, figures.results_bytes = _download(client, url, results, "identity")
        packed = folder / "results.jsonl.gz"
        figures.download_gzip_s, figures.results_gzip_bytes = _download(client, url, packed, "gzip")
    started = time.perf_counter()
    with results.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
    figures.read_s = time.perf_counter() - started
    _check(results, figures.num_requests)
    latencies.sort()
    figures.status_calls = len(latencies)
    figures.status_p50_ms = 1e3 * latencies[len(latencies) // 2]
    figures.status_p99_ms = 1e3 * latencies[int(len(latencies) * 0.99)]
    figures.status_max_ms = 1e3 * latencies[-1]


def _download(client: httpx.Client, url: str, target: Path, encoding: str) -> tuple[float, int]:
    """Seconds it took, and the bytes that went over the line; nothing is unpacked."""
    started = time.perf_counter()
    headers = {"accept-encoding": encoding}
    with client.stream("GET", url, headers=headers) as stream, target.open("wb") as file:
        stream.raise_for_status()
        for chunk in stream.iter_raw(1 << 20):
            file.write(chunk)
    return time.perf_counter() - started, target.stat().st_size


def _check(results: Path, num_requests: int) -> None:
    number = 0
    with results.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = json.loads(raw)
            said = line["response"]["body"]["choices"][0]["message"]["content"]
            if line["custom_id"] != f"r{number - 1}" or said != f"say number {number - 1}":
                raise SystemExit(f"Line {number} of the results is wrong.")
    if number != num_requests:
        raise SystemExit(f"{number} results of {num_requests}.")


def _wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if client.get("/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("The server did not start.")


class _MemoryWatch:
    """Peak resident memory of the processes under one, by what they are."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = {"api": 0.0, "worker": 0.0, "engine": 0.0}
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            for process in self._root.children(recursive=True):
                try:
                    command = " ".join(process.cmdline())
                    peak_mb = process.memory_info().rss / 1e6
                except psutil.Error:
                    continue
                kind = "api" if "serve" in command or "api_server" in command else "worker"
                if "engine.child" in command:
                    kind = "engine"
                self.peak_mb[kind] = max(self.peak_mb[kind], peak_mb)


if __name__ == "__main__":
    sys.exit(main())
