"""The registry file changes, breaks and is mended while a process runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from batch_app.errors import ConfigError
from batch_app.registry_watch import WatchedRegistry

GOOD = '# Ours.\n[[model]]\nname = "a"\nsource = "x"\n\n[[model]]\nname = "b"\nsource = "y"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD.encode() + b'name = "c\n', r"not valid TOML.*line 9"),
        (GOOD.replace('source = "y"', "source = 7").encode(), r", line 8: model\.1\.source"),
        (GOOD.replace('source = "y"\n', "").encode(), r", line 6: model\.1\.source"),
        (GOOD.encode() + b"[model.engine_args]\n[other]\nx = 1\n", r", line 10: other"),
        (GOOD.encode() + b'trust_remote_code = "perhaps"\n', r", line 9: model\.1\.trust_remote"),
        (GOOD.replace('"b"', '"a"').encode(), "names 'a' twice"),
        (GOOD.encode() + b"# \xff\xfe\n", "can't be read"),
        (None, "There is no model registry"),
    ],
)
def test_a_broken_file_is_told_with_its_line_and_the_last_good_one_stays(
    path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, said: str
) -> None:
    watched = WatchedRegistry(path)
    assert watched.problem is None
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    for _ in range(3):
        assert [entry.name for entry in watched.current.entries] == ["a", "b"]
        assert watched.problem is not None
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(watched.problem or "")
    assert watched.problem.endswith("The last version that could be read stays in use.")
    told = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert len(told) == 1
    path.write_text(GOOD.replace('"b"', '"c"'))
    assert [entry.name for entry in watched.current.entries] == ["a", "c"]
    assert watched.problem is None


def test_a_file_that_is_broken_from_the_beginning_is_refused(path: Path) -> None:
    path.write_text(GOOD + "=")
    with pytest.raises(ConfigError, match="line 9"):
        WatchedRegistry(path)


def test_a_fingerprint_is_of_what_the_entry_says(path: Path) -> None:
    watched = WatchedRegistry(path)
    before = watched.entry_fingerprint("b")
    assert before
    assert before != watched.entry_fingerprint("a")
    assert watched.entry_fingerprint("c") == ""
    path.write_text("# A comment.\n" + GOOD)
    assert watched.entry_fingerprint("b") == before
    path.write_text(GOOD + "[model.engine_args]\nmax_model_len = 8\n")
    assert watched.entry_fingerprint("b") != before
