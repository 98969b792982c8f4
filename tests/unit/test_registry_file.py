"""Changes to models.toml: what they say, and that the rest stays as it was."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from batch_app.errors import BadRequest, ConfigError, Conflict, ModelNotFound
from batch_app.registry import ModelRegistry
from batch_app.registry_file import RegistryFile, checked_name, engine_argument

HAND_MADE = """\
# Ours. Ask before you change it.

# small, for trying things
[[model]]
name = "a"            # first
source = "org/a"
aliases = ["x", 'y']
[model.engine_args]
max_model_len = 2048
# a comment inside
hf_overrides = { deep = [1, 2] }

   [[ model ]]
name='b'
source = "org/b"

# of c
# in two lines
[[model]]
name = "c"
source = "org/c"
[model.engine_args]
enforce_eager = true
"""


@pytest.fixture
def file(tmp_path: Path) -> RegistryFile:
    path = tmp_path / "models.toml"
    path.write_text(HAND_MADE)
    return RegistryFile(path)


def test_adding_only_appends(file: RegistryFile) -> None:
    file.add(
        {
            "name": "org/new-4B",
            "source": "org/new",
            "aliases": ["new"],
            "trust_remote_code": True,
            "engine_args": {"max_model_len": 4096, "s": 'quo"te\\ \x7f', "d": {"a b": [1.5, "é"]}},
        }
    )
    assert file.path.read_text().startswith(HAND_MADE)
    entry = ModelRegistry.load(file.path).get("new")
    assert (entry.name, entry.source, entry.trust_remote_code) == ("org/new-4B", "org/new", True)
    assert entry.engine_args == {
        "max_model_len": 4096,
        "s": 'quo"te\\ \x7f',
        "d": {"a b": [1.5, "é"]},
    }
    assert ModelRegistry.load(file.path).get("a").engine_args["hf_overrides"] == {"deep": [1, 2]}


def test_a_first_model_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    RegistryFile(path).add({"name": "a", "source": "org/a"})
    RegistryFile(path).add({"name": "b", "source": "org/b"})
    assert [entry.name for entry in ModelRegistry.load(path).entries] == ["a", "b"]
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("y", HAND_MADE[HAND_MADE.index("# small") : HAND_MADE.index("   [[ model")]),
        ("b", HAND_MADE[HAND_MADE.index("   [[ model") : HAND_MADE.index("# of c")]),
        ("c", HAND_MADE[HAND_MADE.index("\n# of c") :]),
    ],
    ids=["first, by an alias", "middle", "last"],
)
def test_removing_takes_the_entry_and_its_comment(file: RegistryFile, name: str, gone: str) -> None:
    file.remove(name)
    assert file.path.read_text() == HAND_MADE.replace(gone, "")
    assert not ModelRegistry.load(file.path).knows(name)


def test_all_may_go_and_the_head_stays(file: RegistryFile) -> None:
    for name in "cab":
        file.remove(name)
    assert file.path.read_text() == "# Ours. Ask before you change it.\n"
    assert ModelRegistry.load(file.path).entries == ()


def test_what_is_added_and_removed_leaves_the_file_as_it_was(file: RegistryFile) -> None:
    file.add({"name": "n", "source": "s", "engine_args": {"max_model_len": 1}})
    file.remove("n")
    assert file.path.read_text() == HAND_MADE


@pytest.mark.parametrize("name", ["a", "x", "b"])
def test_a_name_that_is_taken_is_refused(file: RegistryFile, name: str) -> None:
    for entry in ({"name": name, "source": "s"}, {"name": "n", "source": "s", "aliases": [name]}):
        with pytest.raises(Conflict, match="already"):
            file.add(entry)
    assert file.path.read_text() == HAND_MADE


@pytest.mark.parametrize(
    "name",
    ["", "..", "../a", "a/../b", "a//b", "/a", "a/", "a b", "ä", "a\n", "a" * 201, "-a", '"'],
)
def test_bad_names_are_refused(file: RegistryFile, name: str) -> None:
    with pytest.raises(BadRequest, match="can't be a model's name"):
        file.add({"name": name, "source": "s"})
    assert file.path.read_text() == HAND_MADE


@pytest.mark.parametrize("name", ["a", "google/gemma-3-4b-it", "x:latest", "A_b.c@1+2", "a/b/c"])
def test_good_names(name: str) -> None:
    assert checked_name(name) == name


def test_one_that_isnt_there_can_t_be_removed(file: RegistryFile) -> None:
    with pytest.raises(ModelNotFound, match="Models there: a, b, c"):
        file.remove("nope")


@pytest.mark.parametrize(
    "text",
    [
        'model = [{ name = "a", source = "s" }]\n',
        '[[model]]\nname = "a"\nsource = """\n[[model]]\n"""\n[[model]]\nname="b"\nsource="s"\n',
    ],
    ids=["inline", "a header in a text"],
)
def test_a_layout_that_isn_t_known_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="by hand"):
        RegistryFile(path).remove("a")
    if text.startswith("model"):
        with pytest.raises(ConfigError, match="by hand"):
            RegistryFile(path).add({"name": "n", "source": "s"})
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text("[[model]\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        RegistryFile(path).add({"name": "n", "source": "s"})


def test_mode_line_ends_and_a_link_stay(tmp_path: Path) -> None:
    path, link = tmp_path / "real.toml", tmp_path / "models.toml"
    path.write_bytes(b'[[model]]\r\nname = "a"\r\nsource = "s"\r\n')
    path.chmod(0o640)
    link.symlink_to(path)
    RegistryFile(link).add({"name": "b", "source": "s"})
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.read_bytes().startswith(b'[[model]]\r\nname = "a"\r\n')


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(HAND_MADE)
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="can't be written"):
        RegistryFile(path).remove("a")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_model_len=8192", ("max_model_len", 8192)),
        ("--max-model-len=8192", ("max_model_len", 8192)),
        ("gpu_memory_utilization=0.9", ("gpu_memory_utilization", 0.9)),
        ("enforce_eager=true", ("enforce_eager", True)),
        ("kv_cache_dtype=fp8", ("kv_cache_dtype", "fp8")),
        ('hf_overrides={"a": [1]}', ("hf_overrides", {"a": [1]})),
        ("chat_template=a=b", ("chat_template", "a=b")),
    ],
)
def test_engine_arguments(text: str, expected: tuple[str, Any]) -> None:
    found = engine_argument(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


@pytest.mark.parametrize("text", ["max_model_len", "=1", "9=1", "a b=1", "x=null", "revision=main"])
def test_bad_engine_arguments_are_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        engine_argument(text)


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@hypothesis.given(value=VALUES)
@hypothesis.settings(max_examples=100)
def test_any_value_comes_back_as_it_went_in(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.mktemp("any") / "models.toml"
    try:
        RegistryFile(path).add({"name": "n", "source": "s", "engine_args": {"it": value}})
    except UnicodeEncodeError:
        hypothesis.reject()
    [entry] = tomllib.loads(path.read_text())["model"]
    assert entry["engine_args"]["it"] == value
