"""Steps of a self-check that end in every way a step can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from batch_app.self_check.step import Note, Options, StepFailed, StepSkipped

NAME = __name__


def passes(options: Options, note: Note) -> str:
    note(seen=options["seen"], before=dict(options["before"]))
    return "all of it"


def fails(options: Options, note: Note) -> str:
    note(half=1)
    print("its last words")
    raise StepFailed("three answers are wrong")


def is_skipped(options: Options, note: Note) -> str:
    raise StepSkipped("there is no model")


def raises(options: Options, note: Note) -> str:
    raise RuntimeError("of its own")


def lacks_a_package(options: Options, note: Note) -> str:
    import no_such_package_anywhere

    return str(no_such_package_anywhere)


def crashes(options: Options, note: Note) -> str:
    note(half=1)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(3600)
    return ""


def hangs(options: Options, note: Note) -> str:
    """With a child in a session of its own, as an engine is, that doesn't end by itself either."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True
    )
    note(child=child.pid)
    time.sleep(3600)
    return ""
