"""vLLM's flags on the command line of `vllm-batch run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_app.cli import run_flags
from batch_app.cli.run_flags import REFUSED, WITHOUT_EFFECT, EngineFlags, take_flags
from batch_app.config import load_settings
from batch_app.engine.vllm_flags import Flag, Takes
from batch_app.errors import BadRequest, ConfigError, ModelNotFound
from batch_app.one_shot_model import one_shot_entry
from batch_app.registry import ModelEntry, ModelRegistry
from batch_app.registry_file import entry_text

OWN = {"--input-file": True, "-i": True, "--model": True, "--overwrite": False}
KNOWN = {
    "--allowed-media-domains": Flag("allowed_media_domains", Takes.SOME),
    "--compilation-config": Flag("compilation_config", Takes.ONE),
    "-cc": Flag("compilation_config", Takes.ONE),
    "--data-parallel-size": Flag("data_parallel_size", Takes.ONE),
    "--dtype": Flag("dtype", Takes.ONE),
    "--enable-log-requests": Flag("enable_log_requests", Takes.NONE),
    "--no-enable-log-requests": Flag("enable_log_requests", Takes.NONE, negated=True),
    "--enable-prefix-caching": Flag("enable_prefix_caching", Takes.NONE),
    "--no-enable-prefix-caching": Flag("enable_prefix_caching", Takes.NONE, negated=True),
    "--enforce-eager": Flag("enforce_eager", Takes.NONE),
    "--gpu-memory-utilization": Flag("gpu_memory_utilization", Takes.ONE),
    "--hf-token": Flag("hf_token", Takes.ONE),
    "--max-model-len": Flag("max_model_len", Takes.ONE),
    "--optimization-level": Flag("optimization_level", Takes.ONE),
    "--port": Flag("port", Takes.ONE),
    "--revision": Flag("revision", Takes.ONE),
    "--served-model-name": Flag("served_model_name", Takes.SOME),
    "--tensor-parallel-size": Flag("tensor_parallel_size", Takes.ONE),
    "-tp": Flag("tensor_parallel_size", Takes.ONE),
    "--trust-remote-code": Flag("trust_remote_code", Takes.NONE),
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of vLLM's flags. That all of them are read right is shown where vLLM is imported."""
    monkeypatch.setattr(run_flags, "known_flags", lambda: KNOWN)


def arguments(line: str) -> dict[str, Any]:
    rest, flags = take_flags(line.split(), OWN)
    assert rest == []
    return flags.engine_args


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--max-model-len 2048", {"max_model_len": 2048}),
        ("--max_model_len=2048", {"max_model_len": 2048}),
        ("--max-model-len 4k", {"max_model_len": "4k"}),
        ("--max-model-len -1", {"max_model_len": -1}),
        ("--max-model-len 1024 --max-model-len 2048", {"max_model_len": 2048}),
        ("--gpu-memory-utilization 0.9", {"gpu_memory_utilization": 0.9}),
        ("--gpu-memory-utilization 0.90", {"gpu_memory_utilization": "0.90"}),
        ("--dtype float16 --enforce-eager", {"dtype": "float16", "enforce_eager": True}),
        ("--enable-prefix-caching", {"enable_prefix_caching": True}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("-tp 2", {"tensor_parallel_size": 2}),
        ("-tp=2", {"tensor_parallel_size": 2}),
        ("-O3", {"optimization_level": 3}),
        ("-O 3", {"optimization_level": 3}),
        ('-cc {"mode":3}', {"compilation_config": '{"mode":3}'}),
        ("-cc.mode=3 -cc.a.b x", {"compilation_config": '{"mode": 3, "a": {"b": "x"}}'}),
        ("-cc.list+ a,b -cc.list+=c", {"compilation_config": '{"list": ["a", "b", "c"]}'}),
        ('-cc {"a":1} -cc.mode 3', {"compilation_config": '{"a": 1, "mode": 3}'}),
        ("--allowed-media-domains a b", {"allowed_media_domains": ["a", "b"]}),
        ("--allowed-media-domains=a", {"allowed_media_domains": ["a"]}),
    ],
)
def test_flags_become_arguments(line: str, expected: dict[str, Any]) -> None:
    assert arguments(line) == expected


def test_ours_stay_where_they_are() -> None:
    line = "in --enforce-eager out --model m -i x --dtype half --overwrite --input_file=y -iz"
    rest, flags = take_flags(line.split(), OWN)
    assert rest == ["in", "out", "--model", "m", "-i", "x", "--overwrite", "--input-file=y", "-iz"]
    assert flags.engine_args == {"enforce_eager": True, "dtype": "half"}
    rest, flags = take_flags(["--", "--dtype", "half"], OWN)
    assert rest == ["--", "--dtype", "half"]
    assert flags == EngineFlags()


def test_what_goes_elsewhere_than_to_the_engines_arguments() -> None:
    line = "--served-model-name a b --revision 0123 --trust-remote-code"
    assert take_flags(line.split(), OWN)[1] == EngineFlags(
        served_names=("a", "b"), revision="0123", trust_remote_code=True
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--max-modell-len 5", "Did you mean --max-model-len"),
        ("--nonsense", "has a flag --nonsense."),
        ("--max-model-len", "needs a value"),
        ("--max-model-len --enforce-eager", "needs a value"),
        ("--enforce-eager=yes", "takes no value"),
        ("-cc 5x -cc.mode 3", "contradicts"),
        ("--enable-log-requests", "never logged"),
        ("--data-parallel-size 2", "--tensor-parallel-size"),
        ("--hf-token secret", "HF_TOKEN"),
        ("--config x.yaml", "give the flags"),
    ],
)
def test_what_is_refused(line: str, words: str) -> None:
    with pytest.raises(BadRequest) as caught:
        take_flags(line.split(), OWN)
    assert words in caught.value.message
    assert "secret" not in caught.value.message


def test_what_has_no_effect_is_noted() -> None:
    line = "--port 8000 --disable-log-requests --no-enable-log-requests --data-parallel-size 1"
    flags = take_flags(line.split(), OWN)[1]
    assert flags.engine_args == {}
    assert [note.split()[0] for note in flags.notes] == ["--port", "--disable-log-requests"]


def test_without_a_known_vllm_the_engine_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_flags, "known_flags", dict)
    rest, flags = take_flags(["in", "out", "--new-flag", "5", "--no-other", "--third"], OWN)
    assert rest == ["in", "out"]
    assert flags.engine_args == {"new_flag": 5, "other": False, "third": True}


def test_the_page_tells_of_every_flag_with_a_meaning_of_its_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    for name, why in (*WITHOUT_EFFECT.items(), *REFUSED.items()):
        assert f"`--{name.replace('_', '-')}`" in page, name
        assert why


# -- which model -----------------------------------------------------------------------------------


def test_a_model_of_the_registry_with_flags_on_top(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(
        '[[model]]\nname = "m"\nsource = "a/b"\naliases = ["n"]\n'
        "[model.engine_args]\nmax_model_len = 1\nseed = 2\n"
    )
    settings = load_settings(models=path)
    entry = one_shot_entry("n", settings, engine_args={"max_model_len": 4}, revision="v1")
    assert entry.name == "m"
    assert entry.engine_args == {"max_model_len": 4, "seed": 2}
    assert entry.revision == "v1"
    assert not entry.trust_remote_code
    with pytest.raises(ModelNotFound, match=r"Models there: m\..*owner/name"):
        one_shot_entry("x", settings)


def test_a_model_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # there is no registry here, and none is asked for
    settings = load_settings()
    (tmp_path / "folder").mkdir()
    entry = one_shot_entry("folder", settings, served_names=("short", "other"))
    assert (entry.name, entry.source) == ("short", str(tmp_path / "folder"))
    assert entry.engine == "vllm"
    assert not entry.trust_remote_code
    assert one_shot_entry("owner/name", settings).source == "owner/name"
    assert one_shot_entry("a/b", settings, trust_remote_code=True).trust_remote_code
    for nowhere in ("./nothing", "/no/thing", "a/b/c", "~/nothing"):
        with pytest.raises(BadRequest, match="no model folder"):
            one_shot_entry(nowhere, settings)
    with pytest.raises(ModelNotFound, match="Models there: none"):
        one_shot_entry("gemma", settings)
    with pytest.raises(ConfigError, match="no model registry"):
        one_shot_entry("a/b", load_settings(models=tmp_path / "missing.toml"))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(texts, texts, st.booleans(), st.dictionaries(texts, values, max_size=4))
def test_an_entry_survives_being_written(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    source: str,
    trusted: bool,
    engine_args: dict[str, Any],
) -> None:
    entry = ModelEntry(
        name=name, source=f"hub/{source}", trust_remote_code=trusted, engine_args=engine_args
    )
    path = tmp_path_factory.getbasetemp() / "one-entry.toml"
    path.write_text(entry_text(entry.model_dump(exclude_none=True)), encoding="utf-8")
    assert ModelRegistry.load(path).entries == (entry,)
