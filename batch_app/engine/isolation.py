"""A network of its own for the engine process: nobody outside reaches what listens in it.

Where torch.distributed is used at all, it listens on 127.0.0.1, also for a process that is alone,
and every user of a machine reaches that. In a network namespace of its own the engine has nothing
but a loopback, and that loopback is another one than the machine's.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 0x1
_IFREQ = struct.Struct("16sH22x")  # the name of an interface, its flags
_CAPABILITY_VERSION_3 = 0x20080522

_NVIDIA_DRIVER = "/dev/nvidiactl"
_MODPROBE_S = 60.0

logger = logging.getLogger(__name__)

#: What the engine's libraries are told there, whatever they were told outside: without it they
#: look for the machine's address.
ON_LOOPBACK = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
#: Arguments of vLLM's that have it talk to other machines, whatever their value.
_REACHING_OUT = frozenset(
    {"master_addr", "data_parallel_address", "kv_transfer_config", "otlp_traces_endpoint"}
)


def needs_network(engine: str, engine_args: Mapping[str, Any]) -> bool:
    """Whether this engine, with these arguments, talks to other machines."""
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    return (
        engine in ("openai", "ray")
        or any(given.get(name) for name in _REACHING_OUT)
        or given.get("nnodes", 1) != 1
        or "ray" in (given.get("distributed_executor_backend"), given.get("data_parallel_backend"))
    )


def prepare_nvidia_devices() -> None:
    """Load the kernel module that CUDA needs, and make its device files, while that's possible.

    CUDA does so itself when it starts, by nvidia-modprobe, which is setuid root. In a user
    namespace that maps only this process's own ids a setuid bit counts for nothing, so after
    `isolate_network` CUDA would fail with "unknown error" on a machine where nothing has used CUDA
    since it started. (What is loaded already can be used from the namespace: the files' owners look
    unknown there, but the process keeps its ids and its groups.)

    Does nothing without NVIDIA's driver or the tool. A failure is logged and harmless if the module
    is loaded already. No new privileges (systemd's NoNewPrivileges) forbid it too: the worker's
    unit runs the tool as root before.
    """
    tool = shutil.which("nvidia-modprobe")
    if tool is None or not Path(_NVIDIA_DRIVER).exists():
        return
    try:
        done = subprocess.run(
            [tool, "-u", "-c", "0"],  # nvidia-uvm, and the device file of the first GPU
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_MODPROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("nvidia-modprobe could not be run: %s", error)
        return
    if done.returncode:
        said = done.stdout.strip() or "it says nothing"
        logger.warning("nvidia-modprobe failed with %d: %s", done.returncode, said)


def isolate_network() -> None:
    """Move this process into a network namespace of its own, in which only a loopback is up.

    Files, devices, shared memory and open descriptors stay as they were. A process that isn't root
    gets a user namespace too, which is what allows it, in which it has its own ids and no power.
    No other thread may be running.

    Raises OSError where the kernel refuses; nothing has changed then.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("Only Linux has network namespaces.")
    _try_in_a_child()
    _isolate()


def _try_in_a_child() -> None:
    """There is no way back from a namespace, should a later step be refused."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            _isolate()
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


def _isolate() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        _call("unshare", _CLONE_NEWNET)
        _bring_up_loopback()
        return
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
    process = Path("/proc/self")
    (process / "setgroups").write_text("deny")  # without it no group may be mapped
    (process / "uid_map").write_text(f"{uid} {uid} 1")
    (process / "gid_map").write_text(f"{gid} {gid} 1")
    _bring_up_loopback()
    _drop_capabilities()


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        flags = _IFREQ.unpack(answer)[1] | _IFF_UP
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags))


def _drop_capabilities() -> None:
    """Those of the namespace: they were needed for its loopback, and for nothing else."""
    _call("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24))


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
