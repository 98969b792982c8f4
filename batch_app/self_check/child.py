"""The process of one step: `python -m batch_app.self_check.child TARGET RESULT`.

Reads the step's options as JSON from standard input. Writes its status, message and figures to the
file RESULT, again with every figure, and ends with 0 whatever came of the step. On SIGUSR1 it
prints what its threads are doing.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from batch_app.engine.lifeline import die_with_parent
from batch_app.errors import BatchAppError
from batch_app.self_check.step import Figures, Options, Status, StepFailed, StepSkipped

_LONGEST_MESSAGE = 1000


class ResultFile:
    """What is known of the step so far. Replaced as a whole at each change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: Figures = {}
        self.write(Status.RUNNING, "")

    def note(self, **figures: Any) -> None:
        """As `step.Note`."""
        self._figures |= figures
        self.write(Status.RUNNING, "")

    def write(self, status: Status, message: str) -> None:
        new = self._path.with_suffix(".new")
        text = json.dumps(
            {"status": status, "message": message[:_LONGEST_MESSAGE], "figures": self._figures}
        )
        new.write_text(text, encoding="utf-8")
        new.replace(self._path)


def run(target: str, options: Options, result: ResultFile) -> None:
    """Run the function and write what came of it; never raises."""
    try:
        module, _, name = target.partition(":")
        summary = getattr(importlib.import_module(module), name)(options, result.note)
    except StepSkipped as reason:
        result.write(Status.SKIP, str(reason))
    except StepFailed as failure:
        result.write(Status.FAIL, str(failure))
    except ModuleNotFoundError as error:
        traceback.print_exc()
        missing = f"the Python package {error.name!r} is missing" if error.name else str(error)
        result.write(Status.FAIL, missing)
    except BatchAppError as error:
        traceback.print_exc()
        result.write(Status.FAIL, error.message)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it was, the step failed
        traceback.print_exc()
        result.write(Status.FAIL, f"{type(error).__name__}: {error}")
    else:
        result.write(Status.PASS, summary)


def main() -> None:
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    target, path = sys.argv[1], Path(sys.argv[2])
    run(target, json.load(sys.stdin), ResultFile(path))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads and pools of an engine


if __name__ == "__main__":
    main()
