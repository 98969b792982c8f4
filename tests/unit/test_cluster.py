"""What the registry says of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_app.cluster import RayCluster, auth_token, replica_args
from batch_app.config import Settings
from batch_app.doctor.finding import State
from batch_app.doctor.models import check_model
from batch_app.engine.base import ModelSpec
from batch_app.engine.isolation import needs_network
from batch_app.engine.slot import longest_start_s
from batch_app.errors import ConfigError
from batch_app.machine import Machine
from batch_app.provenance import run_facts
from batch_app.registry import ModelEntry, ModelRegistry
from unit.test_provenance import INFO

MACHINE = Machine("a processor", "cpu", "here", None, 1 << 34)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"address": "ray://10.0.0.5:10001"}, "Ray Client is not supported"),
        ({"address": "10.0.0.5"}, "ray.address: it is auto, or the head's address"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is larger"),
        ({"max_replica": 2}, "ray.max_replica: Extra inputs"),
        ({"resources": {"GPU": 1}}, "say num_gpus instead"),
        ({"resources": {"spot": 0}}, "spot must be more than 0"),
        ({"engine": "openai"}, "ray.engine"),
        (5, "is a table"),
    ],
)
def test_what_can_t_be_is_refused_in_words(table: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        RayCluster.of({"ray": table})
    with pytest.raises(ValueError, match=words):
        ModelEntry(name="m", source="m", engine="ray", engine_args={"ray": table})


def test_loading_on_a_cluster_has_the_clusters_own_time() -> None:
    settings = Settings(engine_start_timeout_s=1800)
    args = {"ray": {"room_timeout_s": 3600, "start_timeout_s": 1800}}
    spread = ModelSpec(name="m", engine="ray", source="m", engine_args=args)
    assert longest_start_s(spread, settings) >= 3600 + 2 * 1800
    assert longest_start_s(msgspec.structs.replace(spread, engine="vllm"), settings) == 1800


@pytest.mark.parametrize("address", ["auto", "10.0.0.5:6379", "head.cluster.local:6379", "[::1]:5"])
def test_addresses(address: str) -> None:
    assert RayCluster.of({"ray": {"address": address}}).address == address


@pytest.mark.parametrize(
    ("engine_args", "table", "gpus"),
    [
        ({}, {}, 1),
        ({"tensor_parallel_size": 4}, {}, 4),
        ({"tensor-parallel-size": 2, "pipeline_parallel_size": 3}, {}, 6),
        ({"tensor_parallel_size": 4}, {"num_gpus": 0}, 0),
        ({"tensor_parallel_size": 4}, {"engine": "sim"}, 0),
    ],
)
def test_a_replica_takes_as_many_gpus_as_its_engine_uses(
    engine_args: dict[str, Any], table: dict[str, Any], gpus: float
) -> None:
    args = {**engine_args, "ray": table}
    assert RayCluster.of(args).gpus(replica_args(args)) == gpus
    assert replica_args(args) == engine_args


def test_the_driver_has_the_machines_network_and_the_registry_its_folders(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "models.toml").write_text(
        '[[model]]\nname = "m"\nsource = "weights"\nengine = "ray"\n'
        '[model.engine_args.ray]\naddress = "10.0.0.5:6379"\n'
    )
    entry = ModelRegistry.load(tmp_path / "models.toml").get("m")
    assert entry.source == str(tmp_path / "weights")
    assert entry.runs_elsewhere
    assert needs_network(entry.engine, entry.engine_args)
    facts = run_facts(entry, INFO, None, MACHINE)
    assert facts["source"] == "weights"
    assert facts["engine_args"] == {"ray": {"address": "…"}}


def test_the_token_goes_by_rays_own_names(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("from-file\n")
    assert auth_token({}) == ""
    assert auth_token({"RAY_AUTH_TOKEN_PATH": str(path)}) == "from-file"
    assert auth_token({"RAY_AUTH_TOKEN": "own", "RAY_AUTH_TOKEN_PATH": str(path)}) == "own"
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH can't be read"):
        auth_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_a_check_says_what_each_replica_takes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    args = {"tensor_parallel_size": 2, "ray": {"max_replicas": 4, "resources": {"fast": 1}}}
    entry = ModelEntry(name="m", source=str(tmp_path), engine="ray", engine_args=args)
    engine, files = check_model(entry, MACHINE, tmp_path / "none").findings
    assert "1 to 4 replicas, each with 2 GPUs and 1 CPUs of a node, 1 fast" in engine.message
    assert (files.state, files.subject) == (State.WARN, "files")
    entry = entry.model_copy(update={"source": "org/model"})
    assert check_model(entry, MACHINE, tmp_path / "none").state is State.OK
