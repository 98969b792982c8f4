"""How we read vLLM's flags, against its own parser: a new vLLM shows here what has changed."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from batch_app.engine.vllm_flags import Takes, flags_in, known_flags

# vLLM's own imports warn.
pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


def test_every_flag_of_run_batch_is_known_and_takes_what_it_takes() -> None:
    from vllm.entrypoints.launchers.run_batch import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    takes = {None: Takes.ONE, "?": Takes.ONE, 0: Takes.NONE, "+": Takes.SOME}
    theirs = {
        option: (action.dest, takes[action.nargs])
        for action in make_arg_parser(FlexibleArgumentParser())._actions
        for option in action.option_strings
        if action.dest not in ("help", "input_file", "output_file")
    }
    assert len(theirs) > 300
    ours = {option: (flag.name, flag.takes) for option, flag in known_flags().items()}
    assert {option: ours.get(option) for option in theirs} == theirs
    more = ours.keys() - theirs.keys() - {"--input-file", "--output-file"}
    assert all(known_flags()[option].negated for option in more)


@pytest.mark.parametrize(
    ("frontend", "runner"),
    [
        ("entrypoints/common", "entrypoints/launchers"),  # 0.33
        ("entrypoints/launchers", "entrypoints/launchers"),  # 0.30
        ("entrypoints/openai", "entrypoints/openai"),  # 0.24
    ],
)
def test_they_are_found_in_every_layout_of_vllm(frontend: str, runner: str, tmp_path: Path) -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    installed = Path(spec.submodule_search_locations[0])
    places = {
        "engine/arg_utils.py": "engine",
        "entrypoints/*/cli_args.py": frontend,
        "entrypoints/*/run_batch.py": runner,
    }
    for pattern, folder in places.items():
        # The command of the same name is no launcher; an older place may forward to the new one.
        found = max(
            (path for path in installed.glob(pattern) if path.parent.name != "cli"),
            key=lambda path: path.stat().st_size,
        )
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(found, tmp_path / folder / found.name)
    assert flags_in(tmp_path) == known_flags()


def test_the_engine_takes_them_as_a_registry_holds_them() -> None:
    """`--no-…`, numbers, words, lists and JSON, through the parser that the engine process uses."""
    from batch_app.cli.run_flags import take_flags
    from batch_app.engine.vllm_serving import serve_args

    line = (
        "--max-model-len 4k --gpu-memory-utilization 0.90 --no-enable-prefix-caching -tp 2 "
        "--hf-overrides.matryoshka_dimensions+ 32,64 --allowed-media-domains a b --enforce-eager "
        '--compilation-config {"mode":0} -O1 --chat-template-content-format openai '
        "--enable-prompt-tokens-details --default-chat-template-kwargs.enable_thinking false"
    )
    _, flags = take_flags(line.split(), {})
    args = serve_args("m", "m", flags.engine_args)
    assert args.max_model_len == 4000
    assert args.gpu_memory_utilization == 0.9
    assert args.enable_prefix_caching is False
    assert args.tensor_parallel_size == 2
    assert args.hf_overrides == {"matryoshka_dimensions": ["32", "64"]}
    assert args.allowed_media_domains == ["a", "b"]
    assert args.enforce_eager is True
    assert args.enable_prompt_tokens_details is True
    assert args.default_chat_template_kwargs == {"enable_thinking": False}
