"""Bring the weights of a model into the system's file cache before its engine asks for them.

A load reads all of them; from the cache that takes seconds where a disk takes minutes. The cache is
memory that nobody else uses at the moment, so nothing has to be given back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path

import psutil

from batch_app.registry import ModelEntry

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
#: More than this share of the memory that is free would push out what others have in the cache.
LARGEST_SHARE = 0.5
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def local_files(entry: ModelEntry) -> Path | None:
    """The folder with a model's files if it is on this machine; the hub isn't asked."""
    if entry.runs_elsewhere:
        return None
    folder = Path(entry.source).expanduser()
    if folder.is_dir():
        return folder
    if entry.engine != "vllm":
        return None
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    model = cache / f"models--{entry.source.replace('/', '--')}"
    revision = entry.revision or "main"
    with contextlib.suppress(OSError, UnicodeDecodeError):  # else it may be a commit's own hash
        revision = (model / "refs" / revision).read_text(encoding="ascii").strip()
    folder = model / "snapshots" / revision
    return folder if folder.is_dir() else None


class Prefetch:
    """Reads one model's files at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, folder: Path) -> int:
        """Read the weights in this folder, instead of those that are being read.

        Returns their bytes; 0 where there are none, or the memory has no room for them.
        """
        self.stop()
        try:
            found = (path for pattern in _PATTERNS for path in folder.glob(pattern))
            paths = sorted(path for path in found if path.is_file())
            num_bytes = sum(path.stat().st_size for path in paths)
        except OSError:
            return 0
        if not num_bytes or num_bytes > LARGEST_SHARE * psutil.virtual_memory().available:
            return 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=_read_all, args=(paths, self._stopping), name="prefetch", daemon=True
        )
        self._thread.start()
        return num_bytes

    def stop(self) -> None:
        """Give it up. Returns when the last read is over."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self, timeout_s: float) -> bool:
        """Whether everything has been read, within this time."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()


def _read_all(paths: list[Path], stopping: threading.Event) -> None:
    block = bytearray(BLOCK_BYTES)
    for path in paths:
        try:
            with path.open("rb", buffering=0) as file:
                # Reads, not posix_fadvise: one at a time, so that others' go in between.
                while not stopping.is_set() and file.readinto(block):
                    pass
        except OSError as error:
            logger.warning("Can't read %s ahead: %s", path.name, error.strerror)
        if stopping.is_set():
            return
