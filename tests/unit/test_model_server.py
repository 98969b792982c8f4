"""What the registry may say of a model's server, and how its key is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batch_app.engine.process import engine_environment
from batch_app.errors import ConfigError
from batch_app.model_server import ModelServer
from batch_app.provenance import _shown
from batch_app.registry import ModelRegistry

URL = "http://127.0.0.1:8000/v1"


def registry(folder: Path, arguments: str) -> ModelRegistry:
    path = folder / "models.toml"
    path.write_text(
        '[[model]]\nname = "ours"\nsource = "theirs"\nengine = "openai"\n'
        f"[model.engine_args]\n{arguments}\n"
    )
    return ModelRegistry.load(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "base_url: Field required"),
        ('base_url = "ftp://host/v1"', "looks like http"),
        ('base_url = "127.0.0.1:8000"', "looks like http"),
        ('base_url = "http://host:99999/v1"', "looks like http"),
        ('base_url = "http://me:hunter2@host/v1"', "no user, password"),
        ('base_url = "http://host/v1?key=hunter2"', "no user, password, query"),
        (f'base_url = "{URL}"\napi_key = "hunter2"', "name the variable or the file"),
        (f'base_url = "{URL}"\napi_key_env = "hunter2"', "must end in _KEY"),
        (f'base_url = "{URL}"\napi_key_env = "A_KEY"\napi_key_file = "b"', "only one of"),
        (f'base_url = "{URL}"\nmax_concurency = 5', "max_concurency: Extra"),
        (f'base_url = "{URL}"\nmin_concurrency = 9\nmax_concurrency = 8', "is larger than"),
        (f'base_url = "{URL}"\nextra_body = {{stream = true}}', "'stream' can't be set"),
        (f'base_url = "{URL}"\ntimeout_s = 0', "timeout_s: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_used_is_refused_without_repeating_it(
    tmp_path: Path, arguments: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        registry(tmp_path, arguments)
    assert words in caught.value.message
    shown: BaseException | None = caught.value
    while shown is not None:  # what a traceback would show, too
        assert "hunter2" not in str(shown)
        shown = None if shown.__suppress_context__ else shown.__context__


def test_files_are_relative_to_the_registry_and_the_model_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    args = f'base_url = "{URL}/"\napi_key_file = "key.txt"\nca_file = "/etc/ca.pem"'
    entry = registry(tmp_path, args).get("ours")
    server = ModelServer.of(entry.engine_args)
    assert entry.source == "theirs"
    assert server.base_url == URL
    assert server.api_key_file == tmp_path / "key.txt"
    assert server.ca_file == Path("/etc/ca.pem")


def test_a_key_comes_from_the_named_place(tmp_path: Path) -> None:
    def key(environment: dict[str, str], **args: Any) -> str:
        return ModelServer.of({"base_url": URL, **args}).api_key(environment)

    (tmp_path / "key").write_text("sk-file\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("sk-one\nsk-two\n")
    assert key({"OPENAI_API_KEY": "unasked"}) == ""
    assert key({"A_KEY": " sk-env "}, api_key_env="A_KEY") == "sk-env"
    assert key({}, api_key_file=tmp_path / "key") == "sk-file"
    for words, environment, args in [
        ("no API key in the variable A_KEY", {}, {"api_key_env": "A_KEY"}),
        ("no API key in the file empty", {}, {"api_key_file": tmp_path / "empty"}),
        ("no-such (api_key_file) can't be read", {}, {"api_key_file": tmp_path / "no-such"}),
        ("can't be an API key", {}, {"api_key_file": tmp_path / "two"}),
        ("can't be an API key", {"A_KEY": "sk-\x00"}, {"api_key_env": "A_KEY"}),
    ]:
        with pytest.raises(ConfigError) as caught:
            key(environment, **args)
        assert words in caught.value.message
        assert "sk-" not in caught.value.message


@pytest.mark.parametrize("name", ["A_KEY", "HF_TOKEN", "x_SECRET", "MY_PASSWORD"])
def test_a_variable_that_may_hold_a_key_is_kept_from_engine_processes(name: str) -> None:
    if name.isupper():
        ModelServer.of({"base_url": URL, "api_key_env": name})
    assert name not in engine_environment({name: "secret", "PATH": "/bin"})


def test_those_who_use_the_model_do_not_see_where_its_server_is() -> None:
    shown = _shown({"base_url": URL, "api_key_env": "A_KEY", "max_concurrency": 5})
    assert shown == {"base_url": "…", "api_key_env": "…", "max_concurrency": 5}
