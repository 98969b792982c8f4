"""Settings: defaults < file < environment < flags; and the registry of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_app.config import Settings, load_settings
from batch_app.errors import ConfigError, ModelNotFound
from batch_app.registry import ModelRegistry


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vllm-batch.toml"
    monkeypatch.setenv("VLLM_BATCH_CONFIG", str(path))
    return path


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8080)
    assert settings.data_dir == Path("data")
    assert settings.resolved_database_url == "sqlite:///data/database/batch_jobs.db"


def test_precedence(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.write_text('port = 1001\nhost = "10.0.0.1"\nlease_s = 44.0\n')
    monkeypatch.setenv("VLLM_BATCH_PORT", "1002")
    monkeypatch.setenv("VLLM_BATCH_HOST", "10.0.0.2")

    settings = load_settings(port=1003, host=None)

    assert settings.port == 1003
    assert settings.host == "10.0.0.2"
    assert settings.lease_s == 44.0


def test_documented_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_BATCH_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_BATCH_DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("VLLM_BATCH_MODELS", "~/models.toml")

    settings = load_settings()

    assert settings.data_dir == tmp_path
    assert settings.resolved_database_url == "postgresql://u@h/d"
    assert settings.models == Path.home() / "models.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = 70000\n", "port"),
        ('prot = "x"\n', "prot"),
        ("port = \n", "settings file"),
        ('lease_s = "soon"\n', "lease_s"),
    ],
)
def test_what_cannot_be_used_is_named(settings_file: Path, text: str, words: str) -> None:
    settings_file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_settings()


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


class TestRegistry:
    def load(self, tmp_path: Path, text: str) -> ModelRegistry:
        path = tmp_path / "models.toml"
        path.write_text(text)
        return ModelRegistry.load(path)

    def test_names_and_aliases(self, tmp_path: Path) -> None:
        (tmp_path / "weights").mkdir()
        registry = self.load(
            tmp_path,
            '[[model]]\nname = "a"\nsource = "weights"\naliases = ["b"]\n'
            "[model.engine_args]\nmax_model_len = 64\n"
            '[[model]]\nname = "c"\nsource = "hub/c"\n',
        )

        assert registry.get("b") is registry.get("a")
        assert registry.get("a").source == str((tmp_path / "weights").resolve())
        assert registry.get("a").max_model_len == 64
        assert registry.get("c").source == "hub/c"
        assert registry.get("c").engine == "vllm"
        with pytest.raises(ModelNotFound, match="a, c"):
            registry.get("d")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("[[model]\n", "TOML"),
            ('[[model]]\nname = "a"\n', "source"),
            ('[[model]]\nname = "a"\nsource = "s"\nspeed = 1\n', "speed"),
            ('[[model]]\nname = "a"\nsource = "s"\naliases = ["a"]\n', "twice"),
            ('[[model]]\nname = ""\nsource = "s"\n', "name"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path: Path, text: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            self.load(tmp_path, text)

    def test_no_registry(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="VLLM_BATCH_MODELS"):
            ModelRegistry.load(tmp_path / "nothing.toml")
