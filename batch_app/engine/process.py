"""The process of an engine, as the worker holds it: started, spoken to, ended.

It is the head of its own process group (Ctrl-C in the terminal doesn't reach it, and killing the
group leaves nothing behind), inherits no credentials, and writes its output to a log file. Which
model it loads is said later: whoever knows beforehand that an engine is going to be needed starts
the process at once, and it imports its libraries meanwhile. With vLLM that takes most of a load.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import psutil

from batch_app.engine.channel import Channel
from batch_app.engine.memory import num_oom_kills
from batch_app.engine.process_group import end_processes, group_members

Network = Literal["isolated", "host"]

_END_S = 5.0
#: It may have to wait for its own processes (`Engine.end_workers`).
_END_WITH_WORKERS_S = 15.0
_MAX_LOG_BYTES = 16 << 20
_CREDENTIAL = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|DATABASE_URL|STORAGE_URL)($|_)|^(AWS|AZURE|GOOGLE|OTEL)_",
    re.I,
)


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the engine process gets of this environment: no credentials, no way to the hub.

    The interpreter's folder comes first in PATH: what compiles kernels starts `ninja` by its name.
    """
    kept = {name: value for name, value in environment.items() if not _CREDENTIAL.search(name)}
    tools = str(Path(sys.executable).parent)
    folders = environment.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join([tools, *(folder for folder in folders if folder != tools)])
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PATH": path}


class EngineProcess:
    """A running engine process; it dies with the thread that makes this object.

    `engine`: the registry's name of what it is going to be, imported at once; empty: wait to be
    told. `network`: its own or the machine's, see `engine.isolation`.
    """

    def __init__(self, log_path: Path, network: Network, engine: str = "") -> None:
        self.log_path = log_path
        self.network: Network = network
        self.engine = engine
        ours, theirs = socket.socketpair()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        if log_path.exists() and log_path.stat().st_size > _MAX_LOG_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        with log_path.open("ab") as log:
            #: Of the machine, before it could have been killed for its memory.
            self.oom_kills_before = num_oom_kills()
            #: Where its own output begins, in bytes.
            self.log_start = log.tell()
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "batch_app.engine.child"),
                    *(str(theirs.fileno()), network, engine),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                env=engine_environment(os.environ),
                start_new_session=True,
            )
        theirs.close()
        self.channel = Channel(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self) -> None:
        """It is told what to load now. What was logged and killed before is not its doing."""
        self.oom_kills_before = num_oom_kills()
        with contextlib.suppress(OSError):
            self.log_start = self.log_path.stat().st_size

    def wait(self, timeout_s: float = _END_S) -> int | None:
        """Its exit code, None if it still runs after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=timeout_s)
        return None

    def dump_stacks(self) -> None:
        """Have it, and the processes under it, write what their threads are doing to the log."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGUSR1)

    def close(self) -> None:
        """End it and everything that it started, and wait until that has ended."""
        self.channel.close()  # the engine process ends itself at that
        has_ended = self.wait(_END_WITH_WORKERS_S) is not None
        # Also its own children, if it had any: none may keep the device's memory.
        end_processes(group_members(self.pid), patience_s=_END_S if has_ended else 0.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _END_S
        while has_members(self.pid) and time.monotonic() < deadline:
            time.sleep(0.02)


def has_members(group: int) -> bool:
    """Whether a process of this group still has its memory. What only waits to be reaped has none,
    and for what was left behind that may be long: its parent is the machine's first process."""
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return True
    return False
