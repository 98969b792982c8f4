"""Stopping at a signal, whatever the main thread is doing when it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import uvicorn

from batch_app.api_server import _Server
from batch_app.stop_signals import STOP_SIGNALS, StopSignals
from support.waiting import PATIENCE_S


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_does_not_wait_for_what_the_main_thread_holds(number: int) -> None:
    held = threading.Lock()
    is_stopped = threading.Event()

    def stop() -> None:
        with held:
            is_stopped.set()

    with StopSignals(stop, exit_code=1):
        with held:
            os.kill(os.getpid(), number)
            assert not is_stopped.is_set()
        assert is_stopped.wait(PATIENCE_S)


def test_leaving_puts_the_earlier_handlers_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals(lambda: None, exit_code=1):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_signal_ends_the_process_while_the_first_is_still_handled() -> None:
    code = (
        "import os, signal, threading\n"
        "from batch_app.stop_signals import StopSignals\n"
        "with StopSignals(threading.Event().wait, exit_code=7):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    threading.Event().wait()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S, check=False)
    assert ended.returncode == 7


class _InterruptedEvent:
    """As `threading.Event`: a second call within `set`, in the same thread, would never return."""

    def __init__(self) -> None:
        self.server: _Server | None = None
        self.is_being_set = False
        self.num_set = 0

    def set(self) -> None:
        assert not self.is_being_set, "set was called by the handler that interrupted it"
        assert self.server is not None
        self.is_being_set = True
        self.server.handle_exit(signal.SIGTERM, None)
        self.is_being_set = False
        self.num_set += 1


class _Services:
    def __init__(self) -> None:
        self.stopping = _InterruptedEvent()


def test_the_api_server_stops_at_signals_that_come_at_once() -> None:
    services = _Services()
    server = _Server(uvicorn.Config("unused"), services)  # type: ignore[arg-type]
    services.stopping.server = server

    server.handle_exit(signal.SIGTERM, None)

    assert server.should_exit
    assert services.stopping.num_set == 1
