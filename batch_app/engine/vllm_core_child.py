"""The spawned engine core: `python -m batch_app.engine.vllm_core_child FD PARENT_ID`.

What a forked core has from its parent, this one sets up itself (`vllm_process` starts both). FD is
its end of the line; standard input brings its `explain`, pickled.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys

from batch_app.engine.child import GC_THRESHOLDS
from batch_app.engine.lifeline import die_with_parent


def main() -> int:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    gc.set_threshold(*GC_THRESHOLDS)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    explain = pickle.load(sys.stdin.buffer)  # noqa: S301 - our own

    from batch_app.engine.vllm_core import serve_core

    return serve_core(socket.socket(fileno=descriptor), explain, was_forked=False)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # As in `child`.
    os._exit(exit_code)
elif __name__ == "__mp_main__":
    # As in `child`.
    die_with_parent()
