"""Break random lines of the core modules, one after the other, and see which tests notice.

    python tools/mutation_check.py --report docs/mutation_check.json
    python tools/mutation_check.py --seed 2 --count 5 --report /tmp/other.json

Works in a copy of the last commit. The tests that import the broken module are tried first, then
the rest of `make test`, then `make test-long`; the first failure ends it. A break that nobody
notices is reported as such: some change nothing that can be seen. A report that is there already
is continued: only breaks that it lacks, or that nobody noticed, are judged. `--until unit` leaves
out the longer stages.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mutations import Break, breaks_in

ROOT = Path(__file__).parents[1]
#: What decides whether every answer comes once, in order and in time.
CORE = (
    "ahead copies core cuts estimates failure_policy finalize index intake json_lines keeper lease "
    "line_check lines lives outbox outlook pause_watch planner policy queue results retention "
    "retry runner shapes suspects window worker store/* forecast/* engine/retries "
    "engine/concurrency engine/usage"
)
STAGES = ("near", "unit", "test", "test-long")
LONGEST_STAGE_S = 1800
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Verdict:
    """What became of one break: the stage that noticed it, and its first failed test."""

    line: int
    path: str
    before: str
    after: str
    noticed_by: str | None
    stage: str | None
    seconds: float


def chosen(seed: int, count: int) -> list[Break]:
    """`count` breaks of the core modules, at most one for each line; the same for the same seed."""
    package = ROOT / "batch_app"
    paths = sorted({path for name in CORE.split() for path in package.glob(f"{name}.py")})
    every = [each for path in paths for each in breaks_in(path, ROOT)]
    random.Random(seed).shuffle(every)
    lines = {(each.path, each.line): each for each in reversed(every)}
    return [each for each in every if lines[each.path, each.line] is each][:count]


@contextmanager
def working_copy() -> Iterator[Path]:
    """A checkout of the last commit in a temporary folder, with the models and the environment."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder)], check=True)
        try:
            (folder / ".venv").symlink_to(ROOT / ".venv")
            for model in (ROOT / "models").iterdir():
                if not (folder / "models" / model.name).exists():
                    (folder / "models" / model.name).symlink_to(model)
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def stages(copy: Path, broken: str, processes: int) -> Iterator[tuple[str, list[str]]]:
    """The arguments of pytest, from the tests that are about this module to all of them."""
    module = broken.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    imports = re.compile(
        rf"(?:from|import) {re.escape(module)}\b|from {package} import .*\b{name}\b"
    )
    near = [
        str(path.relative_to(copy))
        for path in sorted((copy / "tests").rglob("test_*.py"))
        if imports.search(path.read_text(encoding="utf-8"))
    ]
    if near:
        yield "near", [*near, "-m", "not engine"]
    beside = ["-n", str(processes), "--dist", "loadgroup", "--no-loadscope-reorder"]
    yield "unit", ["tests/unit", *beside]
    yield "test", ["tests", "-m", "not long", *beside]
    yield "test-long", ["tests", "-m", "long", *beside]


def judge(each: Break, copy: Path, options: argparse.Namespace) -> Verdict:
    """Apply the break, run the stages until a test fails, and take it back."""
    path = copy / each.path
    source = path.read_text(encoding="utf-8")
    began = time.monotonic()
    noticed_by = stage = None
    path.write_text(each.apply(source), encoding="utf-8")
    try:
        for stage, arguments in stages(copy, each.path, options.processes):
            noticed_by = first_failure(copy, arguments)
            if noticed_by is not None or stage == options.until:
                break
    finally:
        path.write_text(source, encoding="utf-8")
    return Verdict(
        line=each.line,
        path=each.path,
        before=each.before,
        after=each.after,
        noticed_by=noticed_by,
        stage=stage if noticed_by else None,
        seconds=round(time.monotonic() - began, 1),
    )


def first_failure(copy: Path, arguments: Sequence[str]) -> str | None:
    """The first test that fails, "timeout" where they don't end, None where all pass."""
    process = subprocess.Popen(
        [".venv/bin/python", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": f"{copy}:{copy / 'tests'}:{copy / 'tools'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST_STAGE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "timeout"
    if process.returncode in (0, 5):  # 5: there is no such test
        return None
    if process.returncode == 4:
        raise SystemExit(f"pytest did not understand its arguments:\n{output[-2000:]}")
    found = _FAILED.search(output)
    return found.group(1) if found else f"pytest ended with {process.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    breaks = chosen(options.seed, options.count)
    known = json.loads(options.report.read_text())["breaks"] if options.report.exists() else []
    verdicts = [Verdict(**each) for each in known if each["noticed_by"]]
    judged = {(each.path, each.line, each.before, each.after) for each in verdicts}
    with working_copy() as copy:
        for number, each in enumerate(breaks, 1):
            if (each.path, each.line, each.before, each.after) in judged:
                continue
            verdict = judge(each, copy, options)
            verdicts.append(verdict)
            print(
                f"{number}/{len(breaks)} {each.path}:{each.line} {each.before!r} -> {each.after!r}:"
                f" {verdict.noticed_by or 'NOT NOTICED'} ({verdict.seconds:.0f} s)",
                flush=True,
            )
            report = {"seed": options.seed, "breaks": [asdict(verdict) for verdict in verdicts]}
            options.report.write_text(json.dumps(report, indent=1) + "\n")
    missed = sum(verdict.noticed_by is None for verdict in verdicts)
    print(f"{len(verdicts) - missed} of {len(verdicts)} breaks noticed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
