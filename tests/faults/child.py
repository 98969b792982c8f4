"""A process of the program in which chosen calls to the system fail.

    python -m faults.child batch_app.worker [ARGUMENTS]

`FAIL='{"call": "fsync", "at": 3, "for_good": false, "errno": 28}'` has the third fsync fail, or the
third and all that follow. Calls: `write`, `fsync`, `rename`, `link`, `open` (of a file to write to)
`commit` (of the database), and `commit answer` (it is committed, but the word of it gets lost).
`"torn": true`, for `write`: half of it is written, and the process
dies.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy.engine.default import DefaultDialect


class Fault:
    """Counts calls, and fails some."""

    def __init__(self, at: int, errno: int, for_good: bool = False, torn: bool = False) -> None:
        self.left, self.errno, self.for_good, self.torn = at, errno, for_good, torn

    def strikes(self) -> bool:
        self.left -= 1
        return self.left == 0 or (self.for_good and self.left < 0)

    def error(self) -> OSError:
        return OSError(self.errno, os.strerror(self.errno))

    def around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.strikes():
                raise self.error()
            return real(*arguments, **options)

        return call


def install(call: str, fault: Fault) -> None:
    if call == "write":
        real_write = os.write

        def write(descriptor: int, data: Any) -> int:
            if len(data) < 2 or not fault.strikes():
                return real_write(descriptor, data)
            if fault.torn:
                real_write(descriptor, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            raise fault.error()

        os.write = write
    elif call == "fsync":
        os.fsync, os.fdatasync = fault.around(os.fsync), fault.around(os.fdatasync)
    elif call == "rename":
        os.replace = os.rename = fault.around(os.replace)
    elif call == "link":
        os.link = fault.around(os.link)
    elif call == "open":
        real_open = Path.open

        def open_(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode[0] in "wax" and fault.strikes():
                raise fault.error()
            return real_open(self, mode, *arguments, **options)

        Path.open = open_  # type: ignore[method-assign]
    elif call in ("commit", "commit answer"):
        real_commit = DefaultDialect.do_commit

        def do_commit(self: DefaultDialect, connection: Any) -> None:
            fails = fault.strikes()
            if call == "commit answer":
                real_commit(self, connection)
            if fails:
                raise self.loaded_dbapi.OperationalError("disk I/O error")
            if call == "commit":
                real_commit(self, connection)

        DefaultDialect.do_commit = do_commit  # type: ignore[method-assign]
    else:
        raise ValueError(call)


def main() -> None:
    wish = json.loads(os.environ.pop("FAIL", "{}"))
    if wish:
        install(wish.pop("call"), Fault(**wish))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
