"""Bring a model from the hub into the local cache, before the engine process starts.

`python -m batch_app.engine.fetch SOURCE [REVISION]` prints the folder. A process of its own, since
the hub's token is for it and not for the engine: that one runs offline, on the folder.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from batch_app.engine.base import ModelSpec
from batch_app.errors import EngineLoadError

#: What a model needs to run; other formats of the same weights are left out.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def needs_files(spec: ModelSpec) -> bool:
    """Whether this model's files must be on this machine. The simulated engine reads none, but a
    hub id as its source is fetched all the same: that can be rehearsed without a real model."""
    return spec.engine == "vllm" or (spec.engine == "sim" and "/" in spec.source)


def local_folder(spec: ModelSpec, timeout_s: float) -> str:
    """The folder of the model's files; downloads them only if they are not in the cache.

    Raises:
        EngineLoadError: the hub can't be reached, or doesn't give the model.
    """
    if Path(spec.source).is_dir():
        return spec.source
    command = [sys.executable, "-m", "batch_app.engine.fetch", spec.source, spec.revision or ""]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise EngineLoadError(
            f"The model {spec.name} was not downloaded within {timeout_s:.0f} s.", retriable=True
        ) from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineLoadError(
            f"The model {spec.name} is not on this machine, and {spec.source} could not be "
            f"fetched from the model hub: {reason}"
        )
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    source, revision = sys.argv[1], sys.argv[2] or None
    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=_PATTERNS, local_files_only=True
        )
    except LocalEntryNotFoundError:
        folder = snapshot_download(source, revision=revision, allow_patterns=_PATTERNS)
    sys.stdout.write(folder + "\n")


if __name__ == "__main__":
    main()
