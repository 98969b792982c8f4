"""Look for everything that our code uses of vLLM in other releases, without importing them.

    python tools/check_vllm.py 0.26.0 0.33.0      download their wheels and check them
    python tools/check_vllm.py --source FOLDER    check one that is unpacked
    python tools/check_vllm.py --report ...       write the results into docs/vllm_versions.md too

The names are those of `batch_app/engine/vllm_symbols.py`. A wheel is 300 MB; only its Python files
are kept, in `--cache`. Exit code 1: our code does not run with one of these releases.
"""

from __future__ import annotations

import argparse
import email
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from vllm_contract import Result, State, check  # noqa: E402
from vllm_source import Source  # noqa: E402

from batch_app.engine.vllm_flags import flags_in  # noqa: E402 - found through the line above

PAGE = ROOT / "docs" / "vllm_versions.md"
CACHE = Path("~/.cache/vllm-batch/vllm-sources").expanduser()
BEGIN, END = "<!-- made by tools/check_vllm.py -->", "<!-- end -->"
#: What a wheel for a GPU is built for; of these, pip takes the one that there is.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux2014_x86_64")
#: Fewer flags than this, and the source is laid out in a way that `vllm_flags` cannot read.
_LEAST_FLAGS = 300


class Release(NamedTuple):
    """A release that was checked. `torch` and `python`: what it requires of them."""

    version: str
    torch: str
    python: str
    results: list[Result]

    @property
    def problems(self) -> list[Result]:
        return [result for result in self.results if result.state is not State.FOUND]

    @property
    def works(self) -> bool:
        return not any(result.is_fatal for result in self.results)


def download(version: str, cache: Path) -> Path:
    """The folder with the Python files of this release, downloaded unless it is there.

    Raises:
        CalledProcessError: pip could not download the wheel.
    """
    folder = cache / f"vllm-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
                *("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"),
                *("--abi", "abi3", "--abi", "cp312", *platforms, "--dest", scratch),
                f"vllm=={version}",
            ],
            check=True,
        )
        [wheel] = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name
            ]
            archive.extractall(unpacked, wanted)
        unpacked.rename(folder)
    return folder


def look_at(folder: Path) -> Release:
    """Check an unpacked release. Raises FileNotFoundError if the folder holds no vLLM."""
    source = Source(folder)
    results = check(source)
    num_flags = len(flags_in(folder / "vllm"))
    results.append(
        Result(
            "the flags of `vllm run-batch`",
            State.FOUND if num_flags >= _LEAST_FLAGS else State.CHANGED,
            f"{num_flags} flags",
        )
    )
    metadata = _metadata(folder)
    requirements = metadata.get_all("Requires-Dist") or []
    torch = next((line for line in requirements if re.match(r"torch\b", line)), "torch")
    return Release(
        metadata.get("Version", folder.name.removeprefix("vllm-")),
        torch.partition(";")[0].strip(),
        metadata.get("Requires-Python", ""),
        results,
    )


def _metadata(folder: Path) -> email.message.Message:
    for path in folder.glob("vllm*.dist-info/METADATA"):
        return email.message_from_string(path.read_text(encoding="utf-8"))
    return email.message.Message()


def table(releases: Sequence[Release]) -> str:
    """The results as Markdown: the releases, then every name in each of them."""
    lines = ["| vLLM | torch | Python | names | missing | changed | works |", "|" + "---|" * 7]
    for release in releases:
        counts = [
            sum(result.state is state for result in release.results)
            for state in (State.FOUND, State.MISSING, State.CHANGED)
        ]
        lines.append(
            f"| {release.version} | {release.torch.removeprefix('torch').lstrip('=')} "
            f"| {release.python.replace('<', '&lt;')} | {sum(counts)} | {counts[1]} | {counts[2]} "
            f"| {'yes' if release.works else 'no'} |"
        )
    columns = [_by_owner(release.results) for release in releases]
    owners = list(dict.fromkeys(owner for column in columns for owner in column))
    lines += ["", "What is used, and where each release keeps it:", ""]
    lines += [
        "| name | " + " | ".join(release.version for release in releases) + " |",
        "|" + "---|" * (len(releases) + 1),
    ]
    for owner in owners:
        cells = [_cell(column.get(owner, [])) for column in columns]
        # A place that stays the same is written once.
        row = [
            '"' if number and cell == cells[number - 1] else cell
            for number, cell in enumerate(cells)
        ]
        lines.append(f"| {_code(owner)} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _by_owner(results: Sequence[Result]) -> Mapping[str, list[Result]]:
    owners: dict[str, list[Result]] = {}
    for result in results:
        plain = result.name.startswith(("POST", "vllm.", "$", "the "))
        owner = result.name if plain else re.split(r"[. ]", result.name)[0]
        owners.setdefault(owner, []).append(result)
    return owners


def _cell(results: Sequence[Result]) -> str:
    problems = [
        f"{result.state.value}: {result.name}, {result.detail}"
        for result in results
        if result.state is not State.FOUND
    ]
    if problems:
        return "; ".join(problems).replace("|", "\\|")
    detail = results[0].detail if results else "-"
    return detail.removeprefix("vllm.") if detail != "vllm" else "vllm"


def _code(name: str) -> str:
    return name if "`" in name else f"`{name}`"


def write_report(releases: Sequence[Release], page: Path = PAGE) -> None:
    """Put the results between the marks of the page; the rest of it is written by hand."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(releases)}\n{END}{after}", encoding="utf-8")


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--source", action="append", default=[], type=Path, metavar="FOLDER")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args(words)
    folders = [*options.source]
    folders += [download(version, options.cache) for version in options.versions]
    if not folders:
        parser.error("name a VERSION, or --source FOLDER")
    releases = [look_at(folder) for folder in folders]
    releases.sort(key=lambda release: [int(part) for part in re.findall(r"\d+", release.version)])
    for release in releases:
        says = "works" if release.works else "does not work"
        print(f"{release.version}: {says}; {len(release.results)} names")
        for problem in release.problems:
            print(f"  {problem.state.value}: {problem.name}: {problem.detail}")
    if options.report:
        write_report(releases)
    return 0 if all(release.works for release in releases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
