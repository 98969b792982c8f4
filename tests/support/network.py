"""What the kernel tells of a process's network."""

from __future__ import annotations

import re
from pathlib import Path


def network_of(pid: int) -> int:
    """The number of the network namespace that a process is in."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


def interfaces_of(pid: int) -> list[str]:
    """The names of the interfaces that a process has."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return [line.partition(":")[0].strip() for line in lines]


def has_loopback_up(pid: int) -> bool:
    """Whether a process reaches itself at 127.0.0.1: only then there is a route."""
    return "127.0.0.1" in Path(f"/proc/{pid}/net/fib_trie").read_text()


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's sockets, of whatever family."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if match := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
            found.add(match[1])
    return found


def listening_in_network_of(pid: int) -> dict[str, int]:
    """What listens in the network that a process is in: ports by inodes."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # LISTEN
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found
