"""Write the documents that are made: settings.md and command_line.md from the code, others from
reports.

python tools/write_docs.py            write them
python tools/write_docs.py --check    exit with 1 if one of them is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import typer.main

from batch_app.cli import app
from batch_app.cli.exit_codes import MEANINGS
from batch_app.config import Settings

ROOT = Path(__file__).parents[1]

SETTINGS_HEAD = """\
# Settings

Each may be set, from weakest to strongest: as it is by default; in `vllm-batch.toml` in the folder
the program is started from (another file: `VLLM_BATCH_CONFIG`); in the environment, as
`VLLM_BATCH_` and the name in capitals; by a flag, for those that have one (`vllm-batch serve
--help`).

```toml
# vllm-batch.toml
data_dir = "/srv/batches"
port = 8081
```

An unknown name in the file is an error. This page is made by `tools/write_docs.py`.

| setting | default | meaning |
|---|---|---|
"""


def settings_page() -> str:
    """docs/settings.md, from the fields' own descriptions."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default if field.default != "" else "(empty)"
        rows.append(f"| `{name}` | `{default}` | {field.description} |\n")
    return SETTINGS_HEAD + "".join(rows)


REPORT = ROOT / "docs" / "reliability.json"
REPORT_ON_POSTGRESQL = ROOT / "docs" / "reliability-postgresql.json"
REPORT_ON_VLLM = ROOT / "docs" / "reliability-vllm.json"

RELIABILITY_HEAD = """\
# Reliability

**The promise.** Every request is answered exactly once in the published files, whatever is killed;
nothing accepted is lost. How that is done: [architecture](architecture.md), [the life of a
batch](state_machine.md), [decision 1](decisions/0001-results-log-in-sealed-segments.md), [decision
7](decisions/0007-leases-are-watched-not-dated.md).

**How it is tried.** `make torture` (`TRIALS=300 SEED=1`) runs trials, each from a seed of its own.
A trial submits batches of up to 300 requests to real processes, a tenth of them requests that the
model refuses, and does one of six things. It kills worker, engine, API server or all of them at
random times. It has a process die at a named crash point (`batch_app/faults.py`). It has the Nth
write (also torn), fsync, rename, link, opening of a file or commit of the database fail, once or
for good. It breaks the registry in one of seven ways while batches run and wait, and repairs it
after up to 3 seconds. It has the model hub refuse connections, answer 503 or hang when a model is
wanted. Or it has a remote server fail a share of the requests for a while, or disappear and
return. Then processes with nothing wrong finish the work, and this must hold: the ids in output and
error file are together those of the input, each once, in order; each answer is the one to its
own question; the counts match; nothing is left in the work folders; the database is intact. The
engine is the simulated one, or real vLLM with the demo model (`make torture ENGINE=vllm TRIALS=30`:
kills, registry and hub). A failing trial says its seed; `--only SEED` repeats it, up to how far
the processes happen to be at the moment.

"""

RELIABILITY_TAIL = """
**What isn't covered.** A killed process is not a power loss: what the system had taken was still
written. That fsync is called where it must be is tested (`tests/integration/test_durability.py`),
that the disk obeys it isn't. Two failures at a time, and disks that change bytes under way, are
only in the tests of the results log (`tests/unit/test_results_damage.py`), which cut it at every
byte and flip every byte, also while it is open. Several machines are not part of the trials: what
happens when one is lost with its disk is in `tests/integration/test_object_storage.py`.
"""


def reliability_page() -> str:
    """docs/reliability.md, its figures from the last report of `make torture`."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    again = report["computed"] - report["needed"]
    rows = "".join(f"| `{name}` | {count} |\n" for name, count in report["crash_points"].items())
    return (
        RELIABILITY_HEAD
        + f"**The last report** ([reliability.json](reliability.json)), of {report['date']}, "
        f"{report['machine']}: {report['trials']} trials from seed {report['seed']}, "
        f"{report['requests']:,} requests, {len(report['failures'])} failures, "
        f"in {report['seconds']:,} s.\n\n"
        + _what_failed(report)
        + f"\nOf {report['computed']:,} answers that the engine computed, {again:,} were computed "
        f"again after a death, "
        f"at most {report['most_computed_again']:,} in one trial. Requests that a death cut "
        "off in the middle had no answer yet and aren't counted here.\n\n"
        + "| crash point | deaths there |\n|---|---|\n"
        + rows
        + _on_postgresql()
        + _on_vllm()
        + RELIABILITY_TAIL
    )


def _what_failed(report: dict[str, Any]) -> str:
    return (
        "| | times |\n|---|---|\n"
        + "".join(f"| trials: {kind} | {count} |\n" for kind, count in report["kinds"].items())
        + "".join(f"| killed: {who} | {count} |\n" for who, count in report["killed"].items())
        + "".join(f"| outage: {what} | {n} |\n" for what, n in report.get("outages", {}).items())
        + "".join(f"| {call} | {n} |\n" for call, n in report["failed_calls"].items())
    )


def _on_vllm() -> str:
    if not REPORT_ON_VLLM.exists():
        return ""
    report = json.loads(REPORT_ON_VLLM.read_text(encoding="utf-8"))
    return (
        "\n**On real vLLM** (`make torture ENGINE=vllm TRIALS=30`, the demo model on a CPU). "
        f"The last report ([reliability-vllm.json](reliability-vllm.json)), of {report['date']}: "
        f"{report['trials']} trials from seed {report['seed']}, {report['requests']:,} requests, "
        f"{len(report['failures'])} failures, in {report['seconds']:,} s.\n\n"
        + _what_failed(report)
    )


def _on_postgresql() -> str:
    if not REPORT_ON_POSTGRESQL.exists():
        return ""
    report = json.loads(REPORT_ON_POSTGRESQL.read_text(encoding="utf-8"))
    again = report["computed"] - report["needed"]
    return (
        "\n**On PostgreSQL** (`make torture DATABASE=postgresql`) there are two kinds of trials "
        "more: the database itself is stopped or killed; and two API servers with two workers, "
        "which are killed, or stand still until their leases have run out, share several batches. "
        "Calls that fail may also be commits that take place and whose answer gets lost. The last "
        "report ([reliability-postgresql.json](reliability-postgresql.json)), of "
        f"{report['date']}: "
        f"{report['trials']} trials from seed {report['seed']}, {report['requests']:,} requests, "
        f"{len(report['failures'])} failures, in {report['seconds']:,} s; of "
        f"{report['computed']:,} answers {again:,} were computed again, at most "
        f"{report['most_computed_again']:,} in one trial.\n\n" + _what_failed(report)
    )


COMMANDS_HEAD = """\
# The command line

`vllm-batch COMMAND --help` says the same as this page, which is made by `tools/write_docs.py`.

Data goes to standard output, messages and progress to standard error. Off a terminal there are no
bars and no colours; with `NO_COLOR` set there are no colours on one either. Most commands answer in
JSON with `--json`; `serve`, `worker` and `up` then print what they say as one JSON object a line.

`vllm-batch --install-completion` sets up the completion of commands, options, ids of batches and
names of models, for bash, zsh, fish or PowerShell, whichever it is started from; start the shell
again then. `--show-completion` prints the script instead.

Commands for batches ask the server of this machine, where its settings have it listen. Another one:
`--server` or `VLLM_BATCH_SERVER`; with an API key: `VLLM_BATCH_API_KEY` or `--api-key`.

## Exit codes

| code | meaning |
|---|---|
"""


def command_line_page() -> str:
    """docs/command_line.md, from the program's own help."""
    codes = "".join(f"| {code.value} | {meaning} |\n" for code, meaning in MEANINGS.items())
    program = typer.main.get_command(app)
    return COMMANDS_HEAD + codes + "".join(_commands(program, "vllm-batch"))


def _commands(command: Any, path: str) -> Iterator[str]:
    for name, inner in getattr(command, "commands", {}).items():
        inner_path = f"{path} {name}"
        if hasattr(inner, "commands"):
            yield from _commands(inner, inner_path)
            continue
        context = typer.Context(inner, info_name=inner_path, max_content_width=90)
        context.terminal_width = 90
        yield f"\n## {inner_path}\n\n```text\n{inner.get_help(context).rstrip()}\n```\n"


PAGES = {
    ROOT / "docs" / "command_line.md": command_line_page,
    ROOT / "docs" / "settings.md": settings_page,
    ROOT / "docs" / "reliability.md": reliability_page,
}


def stale_pages() -> list[Path]:
    """The documents that aren't what the code says."""
    return [
        path
        for path, make in PAGES.items()
        if not path.exists() or path.read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    stale = stale_pages()
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is out of date: run tools/write_docs.py")
        return 1 if stale else 0
    for path in stale:
        path.write_text(PAGES[path](), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
