"""Server and worker: who listens, who lives, and who may come in."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import datetime

import httpx
import psutil

from batch_app.config import Settings
from batch_app.core import BatchStatus
from batch_app.doctor.finding import Finding, fail, ok, warn
from batch_app.doctor.storage import has_database
from batch_app.routes.middleware import is_loopback
from batch_app.store import LEASED, Store, WorkerRow

_ANSWER_S = 10.0
_START = "vllm-batch up, or ./start_worker.sh"
_WAIT = (BatchStatus.QUEUED, *LEASED)


def look_at_service(settings: Settings, now: datetime) -> Iterator[Finding]:
    yield from _server(settings)
    yield from _worker(settings, now)


def _server(settings: Settings) -> Iterator[Finding]:
    host, port = settings.host, settings.port
    if not is_loopback(host) and not settings.no_auth and not _has_keys(settings):
        yield fail(
            "API server",
            f"would not start on {host}: there are no API keys, and it would let anyone in",
            "vllm-batch keys create NAME, or host = 127.0.0.1",
        )
    if port == 0:
        yield ok("API server", "takes any free port")
        return
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    place = f"{host} port {port}"
    url = f"http://{f'[{asked}]' if ':' in asked else asked}:{port}"
    try:
        with socket.create_connection((asked, port), timeout=_ANSWER_S):
            pass
    except ConnectionRefusedError:
        yield _free_port(settings, place)
        return
    except OSError as error:
        yield fail("API server", f"{place}: {error.strerror or error}", "correct the setting host")
        return
    try:
        alone = httpx.Limits(max_keepalive_connections=0)  # whoever it is may say too much
        with httpx.Client(trust_env=False, timeout=_ANSWER_S, limits=alone) as client:
            alive = client.get(f"{url}/livez").json()
            health = client.get(f"{url}/health").json()
        version, checks = alive["version"], health["checks"]
    except httpx.TimeoutException:
        yield fail(
            "API server",
            f"{_listener(port)} listens on {place} and gives no answer in {_ANSWER_S:.0f} s",
            "if that is this server, start it again; else end it, or choose another port: --port",
        )
        return
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        who = _listener(port)
        yield fail(
            "API server",
            f"{place} is taken by {who}, which is no batch server",
            "end that, or choose another port: --port, VLLM_BATCH_PORT",
        )
        return
    bad = {name: state for name, state in checks.items() if state != "ok"}
    if bad:
        said = "; ".join(f"{name}: {state}" for name, state in bad.items())
        yield warn("API server", f"{version} runs at {url}, but {said}", "see the other findings")
    else:
        yield ok("API server", f"{version} runs at {url}, and is well")


def _has_keys(settings: Settings) -> bool:
    """Makes no database that isn't there, nor tables in one. True where that can't be told: the
    database's own finding says why."""
    if not has_database(settings):
        return False
    try:
        store = Store(settings.resolved_database_url)
        try:
            present, newest = store.revisions()
            return store.has_keys() if present == newest else present is not None
        finally:
            store.close()
    except Exception:  # noqa: BLE001
        return True


def _free_port(settings: Settings, place: str) -> Finding:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return fail(
            "API server",
            f"can't listen on {place}: {error.strerror or error}",
            "another port (below 1024 only root may), or an address that this machine has",
        )
    return warn("API server", f"does not run; {place} is free", "vllm-batch up, when you want it")


def _listener(port: int) -> str:
    """Who listens, as far as this user may know."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except (psutil.Error, OSError):
        pass
    return f"a program (as root, `lsof -i :{port}` names it)"


def _worker(settings: Settings, now: datetime) -> Iterator[Finding]:
    subject = "worker"
    if not has_database(settings):
        yield warn(subject, "none has ever run here", _START)
        return
    try:
        store = Store(settings.resolved_database_url)
        try:
            present, newest = store.revisions()
            if present != newest:
                return  # the database's finding says it
            workers = store.list_workers()
            counts = store.count_batches()
        finally:
            store.close()
    except Exception:  # noqa: BLE001 - the database's finding says it
        return
    num_waiting = sum(counts.get(status, 0) for status in _WAIT)
    alive = [worker for worker in workers if worker.is_alive(now, settings.heartbeat_s)]
    for worker in alive:
        yield _told(worker, settings)
    if alive:
        return
    waiting = f", and {num_waiting:,} unfinished batches wait for one" if num_waiting else ""
    if workers:
        last = max(worker.heartbeat_at for worker in workers)
        ago_s = (now - last).total_seconds()
        text = f"gone: the last sign of life is {ago_s:,.0f} s old{waiting}"
    else:
        text = f"none runs{waiting}"
    yield fail(subject, text, _START) if num_waiting else warn(subject, text, _START)


def _told(worker: WorkerRow, settings: Settings) -> Finding:
    what = f"{worker.state}, {worker.model or 'no model loaded'}"
    here = worker.host.partition("/")[0]
    silent_s = (worker.engine or {}).get("silent_s", 0.0)
    if silent_s > settings.engine_hang_s / 2:
        return warn(
            "worker",
            f"{worker.id}: its engine has produced no token for {silent_s:.0f} s, with requests in "
            "flight",
            f"wait: at {settings.engine_hang_s:g} s (engine_hang_s) it is started again by itself",
        )
    return ok("worker", f"{worker.id} on {here} (pid {worker.pid}): {what}")
