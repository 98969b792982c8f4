"""Every program in `examples/`, run as it stands against a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acceptance.conftest import Running
from support.site import REPO

pytestmark = pytest.mark.long

FOLDER = REPO / "examples"
PROGRAMS = sorted([*FOLDER.glob("*.py"), *FOLDER.glob("*.sh")])

#: The simulated engine says back what it was asked.
ANSWERS = {
    "sum": "What is 27 + 58?",
    "capital": "What is the capital of France?",
    "product": "What is 6 * 7?",
}
SUMMARIES = {
    "17": "Summarise in five words: Arrived early, works as it should.",
    "18": "Summarise in five words: The lid broke in the first week.",
    "23": "Summarise in five words: Good value, though the manual is thin.",
}


def run(program: Path, url: str, folder: Path, model: str) -> subprocess.CompletedProcess[str]:
    start = ["bash"] if program.suffix == ".sh" else [sys.executable]
    return subprocess.run(
        [*start, str(program)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPO), "VLLM_BATCH_SERVER": url, "MODEL": model},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_readme_lists_them_all() -> None:
    text = (FOLDER / "README.md").read_text()
    assert len(PROGRAMS) == 6
    for program in PROGRAMS:
        assert f"({program.name})" in text


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_an_example_gets_its_answers(program: Path, working: Running, tmp_path: Path) -> None:
    done = run(program, working.url, tmp_path, "sim")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.strip()]
    if program.suffix == ".sh":
        results = [json.loads(line) for line in said]
        got = {
            result["custom_id"]: result["response"]["body"]["choices"][0]["message"]["content"]
            for result in results
        }
        assert got == ANSWERS
        return
    expected = SUMMARIES if program.stem in ("with_pandas", "with_polars") else ANSWERS
    for custom_id, answer in expected.items():
        assert any(custom_id in line and answer in line for line in said), done.stdout
    assert len(said) >= len(expected)
    assert list(tmp_path.iterdir()) == []  # nothing left behind


def test_an_example_says_what_went_wrong(working: Running, tmp_path: Path) -> None:
    done = run(FOLDER / "with_curl.sh", working.url, tmp_path, "no-such")
    assert done.returncode != 0
    assert "Models there" in done.stderr
    done = run(FOLDER / "with_batch_client.py", working.url, tmp_path, "no-such")
    assert done.returncode != 0
    assert "Models there" in done.stderr
