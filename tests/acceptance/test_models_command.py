"""`vllm-batch models …` as a person types it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from acceptance.conftest import Running
from batch_app.cli import app
from batch_app.registry import ModelRegistry
from support.site import SIM_MODELS, Site, echo_line

Run = Callable[..., Result]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Without any process."""
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def run(site: Site, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as somebody whose registry and data are this site's."""
    monkeypatch.setenv("VLLM_BATCH_MODELS", str(site.settings.models))
    monkeypatch.setenv("VLLM_BATCH_DATA_DIR", str(site.settings.data_dir))

    def invoke(*words: str) -> Result:
        done = CliRunner().invoke(app, ["models", *words])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert "\x1b" not in done.output  # no terminal: no colours
        return done

    return invoke


def names(site: Site) -> list[str]:
    return [entry.name for entry in ModelRegistry.load(site.settings.models).entries]


def test_what_there_is_is_listed(run: Run) -> None:
    said = run("list")
    assert said.exit_code == 0
    head, demo, *rest = said.stdout.splitlines()
    assert head.split() == ["MODEL", "ENGINE", "SOURCE", "HERE", "CONTEXT", "ALIASES"]
    assert (demo.split()[0], demo.split()[3:5]) == ("demo", ["yes", "2,048"])
    assert [line.split()[0] for line in rest] == list(SIM_MODELS)
    listed = json.loads(run("list", "--json").stdout)
    assert [one["name"] for one in listed] == ["demo", *SIM_MODELS]
    assert listed[0]["folder"].endswith("models/demo")


def test_a_server_s_models_are_listed(run: Run, waiting: Running) -> None:
    said = run("list", "--server", waiting.url)
    assert said.stdout.splitlines()[0].split()[:2] == ["MODEL", "CONTEXT"]
    assert "tiny-context" in said.stdout
    listed = json.loads(run("list", "--server", waiting.url, "--json").stdout)
    assert [one["model"] for one in listed] == ["demo", *SIM_MODELS]
    assert run("list", "--server", "127.0.0.1:1").exit_code == 7


def test_added_checked_and_removed(run: Run, site: Site) -> None:
    before = site.settings.models.read_text()
    said = run(
        "add",
        "org/new",
        "--source",
        "org/new",
        "--alias",
        "new",
        "-e",
        "max_model_len=4096",
        "--json",
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["engine_args"] == {"max_model_len": 4096}
    assert "Start the API server again" in said.stderr
    assert names(site)[-1] == "org/new"
    checked = run("check", "new")
    assert checked.exit_code == 0
    assert checked.stdout.splitlines()[0] == "org/new"
    assert "warn  files" in checked.stdout
    assert "fix: " in checked.stdout
    assert run("remove", "new").exit_code == 0
    assert site.settings.models.read_text() == before


def test_a_model_that_can_t_run_has_an_exit_code(run: Run, site: Site) -> None:
    demo = ModelRegistry.load(site.settings.models).get("demo").source
    assert run("add", "bad", "--path", demo, "-e", "max_model_len=1000000").exit_code == 0
    said = run("check")
    assert said.exit_code == 11
    assert "fail  config" in said.stdout
    assert "Can't run here: bad." in said.stderr
    body = json.loads(run("check", "bad", "demo", "--json").stdout)
    assert {one["model"]: one["status"] for one in body} == {"demo": "ok", "bad": "fail"}
    assert run("check", "demo").exit_code == 0


def test_refusals_change_nothing(run: Run, site: Site, tmp_path: Path) -> None:
    before = site.settings.models.read_text()
    (tmp_path / "empty").mkdir()
    for words, code, expected in (
        (("add", "sim"), 6, "already"),
        (("add", "../x", "--source", "org/x"), 3, "can't be a model's name"),
        (("add", "x", "--alias", "demo"), 6, "already"),
        (("add", "x", "-e", "nonsense"), 3, "max_model_len=8192"),
        (("add", "x", "--path", str(tmp_path / "nowhere")), 3, "no folder"),
        (("add", "x", "--path", str(tmp_path / "empty")), 3, "config.json"),
        (("add", "x", "--path", str(tmp_path), "--source", "y"), 2, "not both"),
        (("remove", "nope"), 4, "Models there"),
        (("check", "nope"), 4, "Models there"),
    ):
        said = run(*words)
        assert (words, said.exit_code) == (words, code), said.output
        assert expected in said.stderr
        assert said.stdout == ""
    assert site.settings.models.read_text() == before


def test_a_model_that_batches_wait_for_stays(run: Run, site: Site) -> None:
    site.submit([echo_line(0)], "slow")
    said = run("remove", "slow")
    assert said.exit_code == 6
    assert "1 unfinished batches need slow" in said.stderr
    assert "slow" in names(site)
    assert run("remove", "slow", "--force").exit_code == 0
    assert "slow" not in names(site)


def test_a_folder_beside_the_registry_is_named_relatively(run: Run, site: Site) -> None:
    folder = site.settings.models.parent / "own"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert run("add", "own", "--path", str(folder)).exit_code == 0
    assert 'source = "own"\n' in site.settings.models.read_text()
    assert run("check", "own").exit_code == 11  # no weights
