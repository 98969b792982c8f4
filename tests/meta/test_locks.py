"""The locks hold all that pyproject.toml asks for, and nothing that would break an environment."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from batch_app.gpus import oldest_driver

REPOSITORY = Path(__file__).parents[2]
ENGINES = ["cpu", "cuda"]
#: Packages that carry the release of the CUDA toolkit in their version. Its libraries for maths
#: (cuBLAS, cuFFT, …) count on their own; `cuda-toolkit` holds them to its release.
CUDA_TOOLKIT = {
    "cuda-toolkit",
    "nvidia-cuda-cccl",
    "nvidia-cuda-crt",
    "nvidia-cuda-cupti",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-nvjitlink",
    "nvidia-nvtx",
    "nvidia-nvvm",
}


def lock_text(engine: str) -> str:
    return (REPOSITORY / "requirements" / f"{engine}.lock").read_text()


def pins(engine: str) -> dict[str, str]:
    """Package name -> its exact version."""
    found = {}
    for line in lock_text(engine).splitlines():
        if line and line[0] not in "# ":
            pin = Requirement(line)
            [specifier] = pin.specifier
            assert specifier.operator == "==", line
            found[canonicalize_name(pin.name)] = specifier.version
    return found


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["project"]
    return table


@pytest.mark.parametrize("engine", ENGINES)
def test_holds_what_pyproject_asks_for(engine: str, project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras[engine], *extras["test"], *extras["lint"]]
    locked = pins(engine)
    unmet = [
        line
        for line in asked
        if (wanted := Requirement(line))
        and not wanted.specifier.contains(
            locked.get(canonicalize_name(wanted.name), "0.dev0"), prereleases=True
        )
    ]
    assert not unmet, f"run tools/lock.sh: requirements/{engine}.lock lacks {unmet}"


@pytest.mark.parametrize("engine", ENGINES)
def test_names_no_index_and_no_path(engine: str) -> None:
    assert not re.search(r"://|--(find-links|index-url|extra-index)| @ |file:", lock_text(engine))


def test_cpu_lock_keeps_cuda_out() -> None:
    locked = pins("cpu")
    assert locked["torch"].endswith("+cpu")
    media = {"torchvision", "torchaudio", "torchcodec"}
    harmless = {"nvidia-ml-py"}  # Python alone: says what GPUs there are
    cuda = [
        name
        for name in locked.keys() - harmless
        if name in media or name.startswith(("nvidia", "cuda"))
    ]
    assert not cuda, f"beside a CPU torch these break `import transformers`: {cuda}"


def test_the_cuda_toolkit_is_of_one_release() -> None:
    """A compiler beside the headers and libraries of another release fails while a model loads."""
    locked = pins("cuda")
    [release] = re.findall(r"^\d+\.\d+", locked["nvidia-cuda-runtime"])
    others = {
        name: version
        for name, version in locked.items()
        if name in CUDA_TOOLKIT and not version.startswith(f"{release}.")
    }
    assert locked.keys() >= CUDA_TOOLKIT
    assert not others, f"CUDA {release} is mixed with {others}; see requirements/cuda.in"


def test_the_setup_asks_for_the_driver_that_the_cuda_lock_needs() -> None:
    release = pins("cuda")["nvidia-cuda-runtime"]
    script = (REPOSITORY / "tools" / "setup_env.sh").read_text()
    assert re.findall(r"^oldest_driver=(\d+)", script, re.M) == [str(oldest_driver(release))]
    assert re.findall(r"^cuda=([\d.]+)", script, re.M) == [".".join(release.split(".")[:2])]


def test_the_engines_differ_only_where_they_must() -> None:
    """What is tested on one engine's environment is what the other one runs."""
    cpu, cuda = pins("cpu"), pins("cuda")
    differing = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert differing <= {"torch", "triton", "apache-tvm-ffi"}
