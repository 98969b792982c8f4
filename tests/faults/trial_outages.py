"""What goes wrong around the processes: the operator's files, the model hub, a remote server.

Each of these lasts a while and passes by itself. No batch may fail of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from faults.workloads import MAX_WORDS
from support.hub import HubStub
from support.model_server import Broken, Fault, ModelServerStub, always, error
from support.site import REPO
from support.waiting import PATIENCE_S, wait_for

if TYPE_CHECKING:
    from faults.trial import Trial

DEMO_MODEL = REPO / "models" / "demo"
#: How long an outage lasts at most, in seconds.
LONGEST_S = 3.0


def registry(trial: Trial) -> None:
    """The registry is broken, empties, or loses the model, again and again; and is repaired."""
    url, worker = trial.start_both()
    batch_ids = [trial.upload(url) for _ in range(trial.chance.randint(1, 4))]
    path: Path = trial.site.settings.models
    good = path.read_text()
    breaks: dict[str, Callable[[], object]] = {
        "typo": lambda: path.write_text(good.replace("[model.engine_args]", "[model.engine_args")),
        "empty": lambda: path.write_text(""),
        "gone": path.unlink,
        "half": lambda: path.write_text(good[: good.rindex("=")]),
        "model gone": lambda: path.write_text(good[: good.rindex("[[model]]")]),
        "unknown argument": lambda: path.write_text(good + "no_such_argument = 1\n"),
        "not text": lambda: path.write_bytes(b"\xff\xfe" + good.encode()),
    }
    for _ in range(trial.chance.randint(1, 3)):
        trial.wait_for_results(batch_ids[0])
        how = trial.chance.choice(list(breaks))
        trial.report.hit.append(f"outage: registry ({how})")
        breaks[how]()
        if trial.chance.random() < 0.3:
            trial.kill_engine(worker.pid)
        time.sleep(trial.chance.uniform(0.1, LONGEST_S))
        path.write_text(good)
    trial.wait_a_while(batch_ids[-1])
    trial.kill(worker)


def hub(trial: Trial) -> None:
    """The hub is away, refuses or hangs when the model is wanted; then it works."""
    stub = trial.services.hub
    assert stub is not None
    how = trial.chance.choice(["away", "refusing", "hanging", "dies in between"])
    trial.report.hit.append(f"outage: hub ({how})")
    if how in ("refusing", "hanging"):
        stub.mood = how
    if how != "away":
        stub.start()
    url, worker = trial.start_both()
    batch_ids = [trial.upload(url) for _ in range(trial.chance.randint(1, 3))]
    if how == "dies in between":
        stub.mood = "hanging"
        wait_for(lambda: bool(stub.paths), timeout_s=PATIENCE_S, what="it is asked")
        stub.stop()
    time.sleep(trial.chance.uniform(0.5, LONGEST_S))
    if trial.chance.random() < 0.3:
        trial.kill(worker)
        worker = trial.site.start_worker()
    stub.mood = "well"
    if how in ("away", "dies in between"):
        stub.start()
    trial.wait_a_while(batch_ids[-1])
    trial.kill(worker)


def remote_server(trial: Trial) -> None:
    """A server that has the model answers wrongly, or not at all, for a while."""
    stub = trial.services.remote
    assert stub is not None
    stub.start()
    url, worker = trial.start_both()
    batch_ids = [trial.upload(url) for _ in range(trial.chance.randint(1, 3))]
    for _ in range(trial.chance.randint(1, 3)):
        trial.wait_for_results(batch_ids[0])
        how = trial.chance.choice([*_MISBEHAVIOUR, "away"])
        trial.report.hit.append(f"outage: remote server ({how})")
        if how == "away":
            stub.stop()
        else:
            stub.fault = _now_and_then(trial.chance.random(), _MISBEHAVIOUR[how])
        if trial.chance.random() < 0.3:
            trial.kill_engine(worker.pid)
        time.sleep(trial.chance.uniform(0.1, LONGEST_S))
        stub.fault = None
        if how == "away":
            stub.start()
    trial.wait_a_while(batch_ids[-1])
    trial.kill(worker)


class _WithAnError(Response):
    """Status 200, and an error that passes."""

    media_type = "application/json"

    def __init__(self) -> None:
        said = {"error": {"message": "Overloaded.", "type": "X", "param": None, "code": 503}}
        super().__init__(json.dumps(said))


#: Each of them passes when the request is sent again.
_MISBEHAVIOUR: dict[str, Fault] = {
    "500": always(lambda: error(500)),
    "503": always(lambda: error(503, retry_after="0.1")),
    "429": always(lambda: error(429, retry_after="0.1")),
    "broken answers": always(Broken),
    "errors with status 200": always(_WithAnError),
}


def _now_and_then(share: float, fault: Fault) -> Fault:
    """Meets about this share of the requests, by what they say."""

    async def answer(request: Request) -> Response | None:
        is_met = hash(await request.body()) % 100 < max(share, 0.05) * 100
        return await fault(request) if is_met else None

    return answer


@dataclass
class Services:
    """What the model of a trial comes from, beside the program. `cache`: of the hub's models."""

    hub: HubStub | None = None
    remote: ModelServerStub | None = None
    cache: Path | None = None

    @classmethod
    def of(cls, kind: str, root: Path, engine: str) -> Services:
        """What trials of this kind need; nothing is started."""
        if kind == "hub":
            files = {"config.json": b"{}"}
            if engine == "vllm":
                files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
            return cls(hub=HubStub(files=files), cache=root / "hub")
        if kind == "remote server":
            return cls(remote=ModelServerStub(step_s=0.02, max_words=MAX_WORDS))
        return cls()

    def model_entry(self, engine: str, sim_args: Mapping[str, Any]) -> str:
        """The registry's entry of the model `tried`."""
        source, arguments = "sim", sim_args
        if engine == "vllm":
            source = str(DEMO_MODEL)
            arguments = {"max_model_len": 2048, "enforce_eager": True}
        if self.hub is not None:
            source = "example/tried"
            if engine == "sim":
                arguments = {**arguments, "from_hub": True}
        if self.remote is not None:
            source, engine = self.remote.model, "openai"
            arguments = {
                "base_url": self.remote.base_url,
                "max_concurrency": 16,
                "patience_s": 0.5,
                "backoff_s": 0.05,
                "max_backoff_s": 0.2,
                "max_retries": 50,
            }
        entry = [f'[[model]]\nname = "tried"\nsource = "{source}"\nengine = "{engine}"']
        lines = [f"{name} = {orjson.dumps(value).decode()}" for name, value in arguments.items()]
        return "\n".join([*entry, "[model.engine_args]", *lines, ""])

    def environment(self) -> dict[str, str]:
        """Of the processes of the program."""
        if self.hub is None:
            return {}
        assert self.cache is not None
        return self.hub.environment(self.cache)

    def stop(self) -> None:
        for server in (self.hub, self.remote):
            if server is not None:
                server.stop()


OUTAGES: dict[str, Callable[[Trial], None]] = {
    "registry": registry,
    "hub": hub,
    "remote server": remote_server,
}
