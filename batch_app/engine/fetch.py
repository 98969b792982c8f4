"""Bring a model from the hub into the local cache, before the engine process starts.

`python -m batch_app.engine.fetch SOURCE [REVISION]` prints the folder. A process of its own, since
the hub's token is for it and not for the engine: that one runs offline, on the folder.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from batch_app.engine.base import ModelSpec
from batch_app.errors import EngineInterrupted, EngineLoadError, HubUnavailable, StorageFull
from batch_app.files import NO_ROOM

#: What a model needs to run; other formats of the same weights are left out.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
#: Exit codes of the process: the disk is full; there is no such model there; the hub doesn't give
#: it to us. Everything else is taken for a hub that doesn't work at the moment.
_FULL, _NOT_THERE, _REFUSED = 3, 4, 5
#: Somebody may grant access at the hub meanwhile.
_REFUSED_RETRY_S = 600.0
_LOOK_EVERY_S = 0.2


def local_folder(
    spec: ModelSpec, timeout_s: float, interrupted: Callable[[], bool] = lambda: False
) -> str:
    """The folder of the model's files; downloads them only if they are not in the cache.

    Raises:
        HubUnavailable: the hub doesn't answer in time, or refuses us.
        EngineLoadError: the hub hasn't got the model, or not this revision.
        StorageFull: the cache's disk is full.
        EngineInterrupted: `interrupted` answered True.
    """
    if Path(spec.source).is_dir():
        return spec.source
    command = [sys.executable, "-m", "batch_app.engine.fetch", spec.source, spec.revision or ""]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                output, errors = process.communicate(timeout=_LOOK_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                pass
            if interrupted():
                raise EngineInterrupted(f"Fetching {spec.name} was interrupted.")
            if time.monotonic() > deadline:
                raise HubUnavailable(
                    f"The model {spec.name} was not downloaded within {timeout_s:.0f} s "
                    "(engine_start_timeout_s). What has arrived is kept.",
                    model=spec.name,
                )
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    if process.returncode == 0:
        return output.strip().splitlines()[-1]
    raise _problem(
        spec, process.returncode, (errors.strip().splitlines() or ["no reason given"])[-1]
    )


def _problem(spec: ModelSpec, exit_code: int, reason: str) -> Exception:
    what = f"The model {spec.name} is not on this machine, and"
    if exit_code == _FULL:
        return StorageFull(f"{what} there is no room to download {spec.source}: {reason}")
    if exit_code == _NOT_THERE:
        return EngineLoadError(
            f"{what} the model hub has no {spec.source} for us: {reason} Correct `source` or "
            "`revision` in the model registry; a private or gated model needs HF_TOKEN in the "
            "worker's environment."
        )
    if exit_code == _REFUSED:
        return HubUnavailable(
            f"{what} the model hub refuses {spec.source}: {reason} Ask for access at the hub, or "
            "set HF_TOKEN in the worker's environment and restart the worker.",
            retry_after_s=_REFUSED_RETRY_S,
            model=spec.name,
        )
    return HubUnavailable(
        f"{what} {spec.source} can't be downloaded at the moment: {reason}", model=spec.name
    )


def main() -> int:
    source, revision = sys.argv[1], sys.argv[2] or None
    try:
        folder = _fetch(source, revision)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller is told
        cause = error.__cause__ or error  # the hub's library says first what it made of it
        lines = str(cause).strip().splitlines() or [""]
        sys.stderr.write(f"{type(cause).__name__}: {lines[0]}\n")
        return _exit_code(error)
    sys.stdout.write(folder + "\n")
    return 0


def _fetch(source: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(
            source, revision=revision, allow_patterns=PATTERNS, local_files_only=True
        )
    except LocalEntryNotFoundError:
        return snapshot_download(source, revision=revision, allow_patterns=PATTERNS)


def _exit_code(error: BaseException) -> int:
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return _FULL
    if isinstance(error, GatedRepoError | DisabledRepoError):  # kinds of the next ones
        return _REFUSED
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError):
        return _NOT_THERE
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return _REFUSED
    return 1


if __name__ == "__main__":
    sys.exit(main())
