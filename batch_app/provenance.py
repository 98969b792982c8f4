"""Provenance: on what a batch ran, kept with it for good."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_app import __version__, cluster, model_server
from batch_app.engine.base import EngineInfo
from batch_app.machine import Machine
from batch_app.registry import ModelEntry

#: Files up to this size are read whole; of larger ones the ends.
_SMALL_BYTES = 1 << 20
_ENDS_BYTES = 1 << 16
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PRIVATE = frozenset((*model_server.PRIVATE, *cluster.PRIVATE))
_SECRET = re.compile(r"(key|token|secret|password|credential)s?$", re.I)


def run_facts(
    entry: ModelEntry, info: EngineInfo, revision: str | None, machine: Machine
) -> dict[str, Any]:
    """What one model ran on. Paths of the machine are left out, and so is what may be secret."""
    is_folder = not entry.has_server and Path(entry.source).is_dir()
    return {
        "model": entry.name,
        "source": Path(entry.source).name if is_folder else entry.source,
        "model_revision": revision,
        "engine": info.engine,
        "engine_version": info.engine_version,
        "engine_args": _shown(entry.engine_args),
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
        "kv_cache_tokens": info.kv_cache_tokens,
        **info.precision,
        "device": info.device,
        "device_type": info.device_type,
        "driver": machine.driver if info.device_type == "gpu" else None,
        "machine": machine.name,
        "seed": entry.engine_args.get("seed", 0),
    }


def with_run(before: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The batch's provenance, with one more run of it unless that was as one before."""
    runs = list((before or {}).get("runs", ()))
    if facts not in runs:
        runs.append(dict(facts))
    return {"server_version": __version__, "runs": runs}


def model_revision(folder: str, entry: ModelEntry) -> str | None:
    """Which weights these are: the hub's commit, or of a folder a fingerprint of its files.

    The fingerprint reads small files whole and the ends of large ones: milliseconds. None where
    there is no such folder.
    """
    path = Path(folder)
    if _COMMIT.fullmatch(path.name) and path.parent.name == "snapshots":
        return path.name
    if entry.has_server or not path.is_dir():
        return entry.revision
    digest = hashlib.sha256()
    try:
        for file in sorted(path.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                _add_file(digest, file)
    except OSError:
        return entry.revision
    return f"sha256:{digest.hexdigest()[:16]}"


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        if size <= _SMALL_BYTES:
            digest.update(file.read())
            return
        digest.update(file.read(_ENDS_BYTES))
        file.seek(-_ENDS_BYTES, 2)
        digest.update(file.read())


def _shown(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in engine_args.items():
        if isinstance(value, Mapping):
            shown[name] = _shown(value)
        elif name in _PRIVATE or (_SECRET.search(name) and not isinstance(value, int | float)):
            shown[name] = "…"
        elif isinstance(value, str) and value.startswith(("/", "~", "./", "../")):
            shown[name] = Path(value).name
        else:
            shown[name] = value
    return shown
