"""Documents that can't rot: made from the code, or checked against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import write_docs

from benchmarks.estimates import markdown as estimates
from benchmarks.peer import markdown

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def test_pages_made_from_the_code_are_up_to_date() -> None:
    assert write_docs.stale_pages() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_scripts_that_are_named_exist(page: Path) -> None:
    """What stands in backquotes and looks like one of our files is one."""
    text = page.read_text(encoding="utf-8")
    pattern = r"`((?:batch_app|tools|tests|docs|benchmarks|examples)/[\w./-]+\.\w+)`"
    for name in re.findall(pattern, text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_start_vllms_server_as_a_module(page: Path) -> None:
    """`vllm serve` fails with PackageNotFoundError in an environment for CPUs.

    Naming it is fine; giving it a model makes it a command.
    """
    assert re.findall(r"vllm serve [^\s`]+", page.read_text(encoding="utf-8")) == []


def test_the_measured_figures_are_those_of_the_reports() -> None:
    page = markdown.PAGE.read_text(encoding="utf-8")
    section = markdown.render(markdown.load_reports(markdown.REPORTS))
    assert markdown.page_with(section, page) == page, "run python -m benchmarks.peer.markdown"


def test_the_errors_of_estimates_are_those_of_the_reports() -> None:
    page = estimates.PAGE.read_text(encoding="utf-8")
    section = estimates.render(estimates.load())
    assert estimates.page_with(section, page) == page, "run python -m benchmarks.estimates.markdown"
