"""Whether Triton can compile here: it builds small C extensions for Python while a model loads.

Run as a program, `python -m batch_app.compiler` prints what is missing for that interpreter and
exits with 1. Imports the standard library only, since the set-up runs it before there is more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

_COMPILE_S = 60.0
_SOURCE = "#include <Python.h>\n#include <stdlib.h>\nint answer(void) { return 0; }\n"


@dataclass(frozen=True, slots=True)
class CompilerProblem:
    """`message` says what is wrong, `fix` what to do. Sentences without a full stop."""

    message: str
    fix: str


def find_compiler() -> str | None:
    """The compiler that Triton takes: CC (one program, no options), else gcc, else clang."""
    chosen = os.environ.get("CC")
    if chosen is not None:
        return shutil.which(chosen)
    return shutil.which("gcc") or shutil.which("clang")


def find_problem() -> CompilerProblem | None:
    """Compile a Python extension as Triton does; None if that works."""
    compiler = find_compiler()
    if compiler is None:
        chosen = os.environ.get("CC")
        if chosen is not None:
            return CompilerProblem(
                f"CC is {chosen!r}, and there is no such program",
                "unset CC, or set it to one program without options",
            )
        return CompilerProblem(
            "neither gcc nor clang is installed",
            "sudo apt install gcc libc6-dev (Debian, Ubuntu), sudo dnf install gcc (Fedora)",
        )
    headers = python_headers()
    if not (headers / "Python.h").is_file():
        version = "{}.{}".format(*sys.version_info[:2])
        return CompilerProblem(
            f"{headers / 'Python.h'} is missing: the headers of Python {version} aren't installed",
            f"sudo apt install python{version}-dev (Debian, Ubuntu), sudo dnf install "
            f"python3-devel (Fedora; python{version}-devel beside the system's Python)",
        )
    said = _compile(compiler, headers)
    if said is None:
        return None
    return CompilerProblem(
        f"{compiler} can't compile a Python extension: {said}",
        "sudo apt install gcc libc6-dev (Debian, Ubuntu), sudo dnf install gcc (Fedora)",
    )


def python_headers() -> Path:
    """The folder where this Python's Python.h belongs."""
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, whose headers are not below /usr/local
        scheme = "posix_prefix"
    return Path(sysconfig.get_path("include", scheme))


def _compile(compiler: str, headers: Path) -> str | None:
    """The first error that the compiler prints; None if there is none."""
    with tempfile.TemporaryDirectory(prefix="vllm-batch-compiler-") as folder:
        source = Path(folder, "answer.c")
        source.write_text(_SOURCE, encoding="ascii")
        output = str(source.with_suffix(".so"))
        command = [compiler, str(source), "-shared", "-fPIC", "-I", str(headers), "-o", output]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_COMPILE_S, check=False
            )
        except OSError as error:
            return error.strerror or str(error)
        except subprocess.TimeoutExpired:
            return f"no answer in {_COMPILE_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return lines[0] if lines else f"it exits with {done.returncode}"


def main() -> int:
    problem = find_problem()
    if problem is None:
        return 0
    sys.stdout.write(f"{problem.message}\n{problem.fix}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
