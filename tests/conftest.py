"""What holds for every test: no settings from outside, and the fixtures of all tiers."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = [
    "integration.api_fixtures",
    "support.beside",
    "support.tiers",
    "support.postgres",  # before those that import it
    "support.databases",
    "support.object_stores",
    "support.nvml",
]

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # machines of continuous integration stall now and then
    derandomize=True,  # the same examples everywhere; a search for new ones is a run of its own
    database=None,
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# Before anything of the hub's is imported, which looks at it once.
os.environ["HF_HUB_OFFLINE"] = "1"

# What a shell starts in the background ignores Ctrl-C, and so would all that is started from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def usual_log_level() -> None:
    """Some library of an engine's raises the root's, and would silence our warnings in later tests
    of the same process."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the person who runs the tests reaches them."""
    for name in list(os.environ):
        if name.startswith("VLLM_BATCH_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_BATCH_CONFIG", str(tmp_path / "no-such-settings.toml"))
