"""Where settings come from, as `vllm-batch config show` tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from batch_app.cli import app
from batch_app.config import Settings
from batch_app.origins import masked


@pytest.fixture
def settings_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VLLM_BATCH_CONFIG", str(tmp_path / "vllm-batch.toml"))
    return tmp_path / "vllm-batch.toml"


def show(*words: str) -> Result:
    return CliRunner().invoke(app, ["config", "show", *words])


def test_each_setting_has_its_value_and_where_it_is_from(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file.write_text('port = 8081\nhost = "127.0.0.2"\nmedia_domains = ["a.example"]\n')
    monkeypatch.setenv("VLLM_BATCH_PORT", "8082")
    monkeypatch.setenv("vllm_batch_lease_s", "31")
    said = show("--json")
    assert said.exit_code == 0, said.stderr
    body = json.loads(said.stdout)
    found = {row["name"]: row for row in body["settings"]}
    assert list(found) == list(Settings.model_fields)
    assert (found["port"]["value"], found["port"]["source"]) == (8082, "VLLM_BATCH_PORT")
    assert (found["lease_s"]["value"], found["lease_s"]["source"]) == (31.0, "vllm_batch_lease_s")
    assert (found["host"]["value"], found["host"]["source"]) == ("127.0.0.2", str(settings_file))
    assert found["media_domains"]["value"] == ["a.example"]
    assert (found["drain_s"]["value"], found["drain_s"]["source"]) == (30.0, "default")
    assert found["port"]["default"] == 8080
    assert all(row["description"] for row in body["settings"])
    assert body["config_file"] == str(settings_file)
    changed = show("--changed").stdout.splitlines()
    assert [line.split()[0] for line in changed] == [
        "SETTING",
        "host",
        "port",
        "media_domains",
        "lease_s",
        "VLLM_BATCH_CONFIG",
    ]


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_DATABASE_URL", "postgresql://ana:s3cret@db.example/x")
    monkeypatch.setenv("VLLM_BATCH_OTLP_ENDPOINT", "http://u:s3cret@collector.example:4318")
    monkeypatch.setenv("VLLM_BATCH_API_KEY", "vbk_000000000000_s3cret")
    for words in ((), ("--json",), ("--changed",)):
        said = show(*words)
        assert said.exit_code == 0
        assert "s3cret" not in said.output
        assert "postgresql://ana:***@db.example/x" in said.stdout
        assert "VLLM_BATCH_API_KEY" in said.stdout
    assert masked("sqlite:////data/x.db") == "sqlite:////data/x.db"


def test_a_password_is_masked_in_settings_that_can_t_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_BATCH_DATABASE_URL", "postgresql://ana:s3cret@db.example/x")
    monkeypatch.setenv("VLLM_BATCH_PORT", "eighty")
    said = show("--json")
    assert said.exit_code == 1
    assert "s3cret" not in said.output
    body = json.loads(said.stdout)
    assert (body["valid"], "port" in body["problem"]) == (False, True)
    port = next(row for row in body["settings"] if row["name"] == "port")
    assert (port["value"], port["source"]) == ("eighty", "VLLM_BATCH_PORT")
    assert "port" in said.stderr


def test_a_variable_that_means_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_DATADIR", "/x")
    said = show()
    assert said.exit_code == 0
    assert "VLLM_BATCH_DATADIR is set, but there is no such setting" in said.stderr
    assert "Did you mean VLLM_BATCH_DATA_DIR?" in said.stderr
    assert json.loads(show("--json").stdout)["unknown_variables"] == ["VLLM_BATCH_DATADIR"]


def test_a_file_that_is_no_toml_is_told(settings_file: Path) -> None:
    settings_file.write_text("port = \n")
    said = show()
    assert said.exit_code == 1
    assert str(settings_file) in said.stderr
    assert "data_dir" in said.stdout
