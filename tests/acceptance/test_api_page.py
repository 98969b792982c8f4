"""docs/api.md: its examples run, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from acceptance.conftest import Running

pytestmark = pytest.mark.long

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def blocks(language: str, running: Running) -> list[str]:
    """The page's examples, for this server, and for a model that needs no GPU."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return [
        block.replace("http://localhost:8080", running.url)
        .replace('"demo"', '"sim"')
        .replace("model=demo", "model=sim")
        for block in found
    ]


@pytest.fixture
def shell_output(working: Running, tmp_path: Path) -> str:
    script = "\n".join(blocks("sh", working))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_examples_run(shell_output: str, working: Running, tmp_path: Path) -> None:
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 2
    assert '"custom_id":"b"' in shell_output
    *_, native, again = shell_output.splitlines()
    assert '"batch_id"' in native
    assert native.endswith(f"}}{again}"), "the same key, the same batch"

    example, _receiver_of_webhooks = blocks("python", working)  # see test_webhooks
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"status_code":200') == 2
