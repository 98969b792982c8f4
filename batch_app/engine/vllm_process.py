"""The core process (`vllm_core`), as the process that forked it has it: started, told, ended.

It is forked as soon as vLLM is imported. While the parent makes the configuration, the core imports
what only an engine needs; while the core loads the model, the parent makes its tokeniser and its
application. docs/decisions/0010-the-engine-steps-in-a-process-of-its-own.md has the reasons.

Nothing may have touched the GPU before `start`; importing vLLM doesn't.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from typing import Any

from batch_app.core import LimitsTried
from batch_app.engine.lifeline import die_with_parent
from batch_app.engine.vllm_core import Explain, serve_core
from batch_app.engine.vllm_messages import Configure, framed
from batch_app.errors import EngineDied

#: It may be in the middle of a step when it is to end.
_END_S = 5.0


class CoreProcess:
    """A core. It ends when `line` does, or when the thread that started it ends."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.line = line
        self._pid: int | None = pid
        self._environment = dict(os.environ)
        #: Once it has said so.
        self.is_loaded = False

    @classmethod
    def start(cls, explain: Explain) -> CoreProcess:
        """Fork it. `explain` speaks for it where it can't load."""
        ours, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            theirs.close()
            return cls(pid, ours)
        exit_code = 1
        try:
            ours.close()
            die_with_parent()
            exit_code = serve_core(theirs, explain)
        except BaseException:  # noqa: BLE001 - this process must never run on into the parent's code
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(exit_code)

    @property
    def pid(self) -> int | None:
        """None once its end was seen."""
        return self._pid

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
        """End it: by itself, as its line has ended, or by force. Idempotent."""
        self.line.close()
        # One that loads doesn't look at its line, and has nothing to finish.
        if self._pid is not None and self._reap(_END_S if self.is_loaded else 0.0) is None:
            os.kill(self._pid, signal.SIGKILL)
            self._reap(_END_S)

    def ended(self) -> EngineDied:
        """How it ended, put into words."""
        exit_code = self._reap(_END_S)
        how = f"exit code {exit_code}"
        if exit_code is not None and exit_code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-exit_code).name}"
        return EngineDied(f"the engine core ended ({how})", exit_code=exit_code)

    def _reap(self, timeout_s: float) -> int | None:
        """The core's exit code, negative for a signal; None while it lives."""
        deadline = time.monotonic() + timeout_s
        while self._pid is not None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:  # somebody else reaped it
                pid, status = self._pid, 0
            if pid:
                self._pid = None
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return None
