"""Telling systemd how it goes: ready, alive, stopping. Does nothing where systemd didn't start us.

The protocol is one datagram with lines of NAME=VALUE to the socket that NOTIFY_SOCKET names; see
sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress


class ServiceNotifier:
    """Messages to the service manager. A message that can't be sent is dropped."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of Linux's abstract names.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched_us = environment.get("WATCHDOG_USEC", "")
        mine = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        #: Seconds within which `alive` has to be called again and again; None: nobody watches.
        self.watchdog_s = int(watched_us) / 1e6 if watched_us.isdecimal() and mine else None

    def ready(self) -> None:
        self._send("READY=1")

    def alive(self) -> None:
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with (
            suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.settimeout(1.0)
            sender.sendto(message.encode(), self._address)
