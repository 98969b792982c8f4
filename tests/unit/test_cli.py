"""The command line: what it hands on, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from batch_app import __version__, api_server, one_shot, worker
from batch_app.cli import app
from batch_app.cli.program import Program
from batch_app.config import Settings
from batch_app.registry import ModelEntry
from support.site import REPO

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert __version__ in result.output


@pytest.mark.parametrize("command", ["serve", "worker", "up"])
def test_help_names_the_flags(command: str) -> None:
    result = runner.invoke(app, [command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for flag in ("--host", "--port", "--data-dir", "--models", "--database-url"):
        assert flag in result.output


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []

    def keep(settings: Settings) -> int:
        given.append(settings)
        return 3

    monkeypatch.setattr(api_server, "serve", keep)
    monkeypatch.setattr(worker, "main", keep)
    monkeypatch.setenv("VLLM_BATCH_PORT", "1001")
    monkeypatch.setenv("VLLM_BATCH_MODELS", "from-environment.toml")
    for command in ("serve", "worker"):
        result = runner.invoke(app, [command, "--port", "1002", "--data-dir", "/x"])
        assert result.exit_code == 3
        assert given[-1].port == 1002
        assert given[-1].data_dir == Path("/x")
        assert given[-1].models == Path("from-environment.toml")
        assert given[-1].no_auth is False


def test_json_is_the_format_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []

    def keep(settings: Settings) -> int:
        given.append(settings)
        return 0

    monkeypatch.setattr(api_server, "serve", keep)
    monkeypatch.setattr(worker, "main", keep)
    for command in ("serve", "worker"):
        assert runner.invoke(app, [command, "--json"]).exit_code == 0
        assert given[-1].log_format == "json"
        assert runner.invoke(app, [command]).exit_code == 0
        assert given[-1].log_format == "text"
        result = runner.invoke(app, [command, "--json", "--log-format", "text"])
        assert result.exit_code == 2
    assert runner.invoke(app, ["up", "--json", "--log-format", "text"]).exit_code == 2


@pytest.mark.parametrize("command", ["serve", "up"])
def test_open_addresses_are_refused(command: str) -> None:
    result = runner.invoke(app, [command, "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert "--no-auth" in result.output


def test_a_bad_setting_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_LEASE_S", "soon")
    result = runner.invoke(app, ["serve"])
    assert result.exit_code == 1
    assert "lease_s" in result.output
    assert "Traceback" not in result.output


def test_run_takes_the_names_of_vllms_runner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[tuple[Path, Path, str]] = []

    def keep(source: Path, output: Path, *, entry: ModelEntry, **_: object) -> int:
        given.append((source, output, entry.name))
        return 3

    monkeypatch.setattr(one_shot, "main", keep)
    for names in (["a", "b"], ["-i", "a", "-o", "b"], ["--input-file", "a", "--output-file", "b"]):
        result = runner.invoke(app, ["run", *names, "--model", "a/m"])
        assert result.exit_code == 3
        assert given.pop() == (Path("a"), Path("b"), "a/m")
    result = runner.invoke(app, ["run", "a", "--model", "a/m"])
    assert result.exit_code == 2
    assert not given


def test_every_model_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    group = typer.main.get_command(app)
    assert isinstance(group, Program)
    seen = set()
    for name, command in group.commands.items():
        for parameter in command.params:
            if parameter.name in ("model", "load"):
                seen.add(name)
                context = typer.Context(command)
                found = [one.value for one in parameter.shell_complete(context, "de")]
                assert found == ["demo"], f"{name} {parameter.name}"
    assert seen == {"submit", "validate", "run", "estimate", "bench", "doctor"}
