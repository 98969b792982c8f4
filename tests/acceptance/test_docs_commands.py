"""Every `bash` block of the README and the documents, run page by page against a real server.

A block after `<!-- not run: REASON -->` is only looked at: its syntax, and that what it names of
the project exists. Ids that stand for an example's own are replaced by those of what was made last.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from batch_app.cli.program import app
from support.site import REPO, Site
from support.waiting import wait_for

pytestmark = pytest.mark.long

PAGES = sorted([REPO / "README.md", *(REPO / "docs").glob("*.md")])
BLOCK = re.compile(r"(?:<!-- not run: ([^>]+) -->\n)?^```bash\n(.*?)^```", re.M | re.S)
BATCH_ID = re.compile(r"\bbatch_[0-9a-f]{24}\b")
KEY_ID = re.compile(r"\bkey_[0-9a-f]{12}\b")


@dataclass(frozen=True)
class Block:
    text: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(text, reason or None) for reason, text in found]


RUN = [page for page in PAGES if any(not block.not_run for block in blocks(page))]
NOT_RUN = [(page, block) for page in PAGES for block in blocks(page) if block.not_run]


def name(page: Path) -> str:
    return str(page.relative_to(REPO))


def prepared(root: Path, site: Site) -> dict[str, str]:
    """A folder like a clone's, on this site. Returns the environment of its commands."""
    for folder in (root / ".venv" / "bin", root / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    program = root / ".venv" / "bin" / "vllm-batch"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m batch_app.cli "$@"\n')
    program.chmod(0o755)
    example = (REPO / "batch_100_real.jsonl").read_bytes()
    for file in ("batch_100_real.jsonl", "input.jsonl"):
        (root / file).write_bytes(example)
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "VLLM_BATCH_DATA_DIR": str(site.settings.data_dir),
        "VLLM_BATCH_MODELS": str(site.settings.models),
        "VLLM_BATCH_BENCHMARKS_DIR": str(site.settings.benchmarks_dir),
    }


def for_this_site(text: str, site: Site, url: str) -> str:
    """The block's commands, for this server, for a model that needs no engine, with real ids."""
    text = text.replace("http://localhost:8080", url)
    text = re.sub(r"(model=|--model |bench )demo\b", r"\1sim", text)
    if BATCH_ID.search(text):
        newest = site.store.list_batches(limit=1)[0][0]
        if "/results" in text:
            site.wait_until_done(newest.id)
        text = BATCH_ID.sub(newest.id, text)
    if KEY_ID.search(text):
        text = KEY_ID.sub(site.store.list_keys()[-1].id, text)
    return text


@pytest.mark.parametrize("page", RUN, ids=name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    site = Site(tmp_path, min_free_bytes=0, poll_interval_s=0.2)
    try:
        url = site.start_server()
        site.start_worker()
        wait_for(
            lambda: httpx.get(f"{url}/health", timeout=120).status_code == 200,
            what="the server is well",
        )
        clone = tmp_path / "clone"
        environment = prepared(clone, site) | {"VLLM_BATCH_SERVER": url}
        for block in blocks(page):
            if block.not_run:
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", for_this_site(block.text, site, url)],
                cwd=clone,
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            said = f"{block.text}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, said
            # The README's example cancels a batch that has ended by then.
            assert '"error":{' not in done.stdout.replace('"error": {', '"error":{') or (
                "DELETE" in block.text and "nothing to cancel" in done.stdout
            ), said
    finally:
        site.close()


@pytest.mark.parametrize(
    ("page", "block"), NOT_RUN, ids=[f"{name(page)}: {block.not_run}" for page, block in NOT_RUN]
)
def test_what_is_not_run_names_what_there_is(page: Path, block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M)
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        for word in words:
            if word.startswith(("deploy/", "./")):
                assert (REPO / word).exists(), word
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if words and words[0].endswith("vllm-batch"):
            shown = CliRunner().invoke(app, [*words[1:2], "--help"])
            assert shown.exit_code == 0, line
            flags = [word for word in words[2:] if word.startswith("--")]
            assert all(flag in shown.output for flag in flags), line


def test_every_page_is_in_the_index() -> None:
    index = (REPO / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (REPO / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name
