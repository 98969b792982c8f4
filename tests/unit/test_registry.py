"""What a registry file may not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from batch_app.errors import ConfigError
from batch_app.registry import ModelRegistry


def load(folder: Path, engine: str, arguments: str) -> ModelRegistry:
    path = folder / "models.toml"
    path.write_text(
        f'[[model]]\nname = "m"\nsource = "org/m"\nengine = "{engine}"\n'
        f"[model.engine_args]\n{arguments}\n"
    )
    return ModelRegistry.load(path)


@pytest.mark.parametrize("engine", ["vllm", "ray"])
@pytest.mark.parametrize(
    "argument", ["data_parallel_size = 2", "data-parallel-size = 8", 'data_parallel_size = "2"']
)
def test_data_parallel_is_refused_with_what_to_do(
    engine: str, argument: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, engine, argument)
    said = caught.value.message
    assert "m: data_parallel_size" in said
    assert "one worker for each GPU" in said
    assert 'engine = "ray"' in said


@pytest.mark.parametrize(
    "argument",
    ["data_parallel_size = 1", 'data_parallel_size = "1"', "tensor_parallel_size = 2", ""],
)
def test_one_engine_is_fine(argument: str, tmp_path: Path) -> None:
    assert load(tmp_path, "vllm", argument).get("m").engine == "vllm"
