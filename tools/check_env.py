"""Print the packages of a lock that this Python's environment lacks or holds damaged, one a line.

    .venv/bin/python tools/check_env.py requirements/cpu.lock

A package is damaged when its list of files is gone or a file of it is missing or has the wrong
size: what an installation leaves behind that was killed half-way, and what pip takes for complete.
"""

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # always there, whatever else is not


def damage(found: Distribution) -> str | None:
    """What is wrong with an installed package, or None."""
    files = found.files
    if not files:
        return "no list of its files"
    for file in files:
        if file.suffix == ".pyc":
            continue  # made anew when missing
        try:
            size = Path(str(file.locate())).stat().st_size
        except FileNotFoundError:
            return f"{file} is missing"
        if file.size is not None and file.size != size:
            return f"{file} has {size} bytes instead of {file.size}"
    return None


def main(lock: str) -> None:
    for line in Path(lock).read_text().splitlines():
        if not line or line[0] in "# ":
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            found = distribution(pin.name)
        except PackageNotFoundError:
            problem: str | None = "not installed"
        else:
            problem = (
                damage(found)
                if pin.specifier.contains(found.version, prereleases=True)
                else f"{found.version} is installed"
            )
        if problem:
            print(f"{pin.name}{pin.specifier}")
            print(f"{pin.name}{pin.specifier}: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
