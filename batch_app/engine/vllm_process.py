"""The core process (`vllm_core`), as the process that starts it has it: started, told, ended.

It is started as soon as vLLM is imported. While the parent makes the configuration, the core
imports what only an engine needs; while the core loads the model, the parent makes its tokeniser
and its application (docs/decisions/0010-the-engine-steps-in-a-process-of-its-own.md).

It is forked, or spawned where CUDA would not survive that (`vllm_core_start`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

import psutil

from batch_app.core import LimitsTried
from batch_app.engine.lifeline import die_with_parent
from batch_app.engine.process_group import descendants, end_processes
from batch_app.engine.vllm_core import Explain, serve_core
from batch_app.engine.vllm_core_start import StartMethod
from batch_app.engine.vllm_messages import Configure, framed
from batch_app.errors import EngineDied, EngineError

#: It may be in the middle of a step when it is to end.
_END_S = 5.0
#: vLLM gives its workers 5 s to end (VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS), then terminates them.
_END_WORKERS_S = 10.0
_LOOK_S = 0.01


class CoreLostGpu(EngineError):
    """A forked core could not use the GPU. A spawned one can."""


class _Forked:
    """A child of this process, as `subprocess.Popen` would show it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives."""
        with self._lock:
            if self._exit_code is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # somebody else reaped it
                    pid, status = self.pid, 0
                if pid:
                    self._exit_code = os.waitstatus_to_exitcode(status)
            return self._exit_code


class CoreProcess:
    """A core. It ends when `line` does, or when the thread that started it ends."""

    def __init__(self, process: _Forked | subprocess.Popen[bytes], line: socket.socket) -> None:
        self.line = line
        self._process = process
        self._environment = dict(os.environ)
        #: It looks at its line only once it has loaded; or it has failed, and ends.
        self.is_loading = True

    @classmethod
    def start(cls, explain: Explain, method: StartMethod = "fork") -> CoreProcess:
        """Start it. `explain` speaks for it where it can't load; pickled if it is spawned."""
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        process = _spawn(theirs, explain) if method == "spawn" else _fork(ours, theirs, explain)
        theirs.close()
        return cls(process, ours)

    @property
    def pid(self) -> int | None:
        """None once its end was seen."""
        return self._process.pid if self._process.poll() is None else None

    def configure(self, vllm_config: Any, started_with: LimitsTried) -> None:
        """Have it load this. Raises EngineDied if it has ended."""
        import cloudpickle
        from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

        maybe_register_config_serialize_by_value()  # classes of a model's own code
        before = self._environment
        environment = {
            name: value for name, value in os.environ.items() if before.get(name) != value
        }
        wanted = Configure(cloudpickle.dumps(vllm_config), environment, started_with)
        try:
            self.line.sendall(framed([wanted]))
        except OSError:
            raise self.ended() from None

    def end(self) -> None:
        """End it and what it started: by itself, as its line has ended, or by force. Idempotent."""
        self.end_line()
        self.line.close()
        self._end()

    def end_beside(self) -> None:
        """The same from another thread, while `line` is in use, where it started processes.

        Without any it does nothing: such a core may be killed.
        """
        if self._workers():
            self.end_line()
            self._end()

    def end_line(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.line.shutdown(socket.SHUT_RDWR)

    def ended(self) -> EngineDied:
        """How it ended, put into words."""
        exit_code = self._wait(_END_S)
        how = f"exit code {exit_code}"
        if exit_code is not None and exit_code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-exit_code).name}"
        return EngineDied(f"the engine core ended ({how})", exit_code=exit_code)

    def _end(self) -> None:
        workers = self._workers()
        # One that loads doesn't look at its line, and has nothing to finish.
        patience_s = _END_WORKERS_S if workers else _END_S
        if self._wait(0.0 if self.is_loading else patience_s) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)
            self._wait(_END_S)
        end_processes(workers, patience_s=0.0)

    def _workers(self) -> list[psutil.Process]:
        """The processes that it started. Once its end was seen, its id may be another's."""
        return [] if self._process.poll() is not None else descendants(self._process.pid)

    def _wait(self, timeout_s: float) -> int | None:
        """As `poll`, once it has ended or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (exit_code := self._process.poll()) is None and time.monotonic() <= deadline:
            time.sleep(_LOOK_S)
        return exit_code


def _fork(ours: socket.socket, theirs: socket.socket, explain: Explain) -> _Forked:
    pid = os.fork()
    if pid:
        return _Forked(pid)
    exit_code = 1
    try:
        ours.close()
        die_with_parent()
        exit_code = serve_core(theirs, explain, was_forked=True)
    except BaseException:  # noqa: BLE001 - this process must never run on into the parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _spawn(theirs: socket.socket, explain: Explain) -> subprocess.Popen[bytes]:
    import cloudpickle

    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "batch_app.engine.vllm_core_child"),
            *(str(theirs.fileno()), str(os.getpid())),
        ],
        stdin=subprocess.PIPE,
        pass_fds=(theirs.fileno(),),
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # its end is noticed by its line
        process.stdin.write(cloudpickle.dumps(explain))
    return process
