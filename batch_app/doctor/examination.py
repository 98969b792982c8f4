"""All that `vllm-batch doctor` looks at, in the order in which it is told."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from batch_app import __version__
from batch_app.config import load_settings
from batch_app.core import is_success, utc_now
from batch_app.doctor.engine import look_at_engine, look_at_versions
from batch_app.doctor.finding import Finding, State, fail, ok, warn
from batch_app.doctor.models import check_model
from batch_app.doctor.service import look_at_service
from batch_app.doctor.storage import look_at_storage
from batch_app.engine.base import EngineRequest
from batch_app.engine.limits import LoweredLimits
from batch_app.engine.slot import EngineSlot
from batch_app.errors import BatchAppError, ConfigError, EngineError
from batch_app.files import DataDir
from batch_app.machine import this_machine
from batch_app.origins import origins
from batch_app.registry import ModelRegistry

OLDEST_PYTHON = (3, 11)
_QUESTION = b'{"prompt": "1 + 1 =", "max_tokens": 8}'
_ANSWER_S = 120.0


def examine(
    *,
    data_dir: Path | None = None,
    models: Path | None = None,
    load: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Look at everything, a finding at a time; `load` names a model to load for real.

    Raises ModelNotFound where there is no such model.
    """
    yield ok(
        "vllm-batch",
        f"{__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}",
    )
    yield from look_at_versions()
    found = origins()
    try:
        settings = load_settings(data_dir=data_dir, models=models)
    except ConfigError as error:
        fix = "vllm-batch config show says where each is from"
        yield fail("settings", error.message, fix)
        return
    if load is not None:
        with suppress(ConfigError):  # a finding says it, further down
            ModelRegistry.load(settings.models).get(load)
    for name, meant in found.unknown.items():
        fix = f"did you mean {meant}?" if meant else "unset it; docs/settings.md has all there are"
        yield warn("settings", f"{name} is set, and there is no such setting", fix)
    changed = [one.name for one in found.settings if one.source != "default"]
    yield ok("settings", f"set: {', '.join(changed)}" if changed else "all as by default")
    machine = this_machine()
    yield from look_at_engine(settings, machine)
    yield from look_at_storage(settings)
    yield from look_at_service(settings, utc_now())
    try:
        registry = ModelRegistry.load(settings.models)
    except ConfigError as error:
        yield fail("models", error.message, "vllm-batch models add HUB_ID_OR_FOLDER makes one")
        return
    if not registry.entries:
        yield fail(
            "models", f"{settings.models} names none", "vllm-batch models add HUB_ID_OR_FOLDER"
        )
    lowered = DataDir(settings.data_dir).lowered_limits_file
    for entry in registry.entries:
        check = check_model(entry, machine, lowered)
        bad = [one for one in check.findings if one.state is not State.OK]
        if not bad:
            yield ok("model", f"{entry.name}: nothing speaks against it")
        for one in bad:
            message = f"{entry.name}: {one.subject}: {one.message}"
            yield Finding("model", one.state, message, one.fix)
    if load is not None:
        entry = registry.get(load)
        say(f"Loading {entry.name}. That may take minutes …")
        with tempfile.TemporaryDirectory(prefix="vllm-batch-doctor-") as folder:
            log, limits = Path(folder) / "engine.log", Path(folder) / "limits.json"
            # A copy: memory that runs short beside a worker at work says nothing of it alone.
            if lowered.is_file():
                shutil.copy(lowered, limits)
            slot = EngineSlot(settings, log, lambda: False, LoweredLimits(limits))
            try:
                yield from _loaded(slot, registry, settings.models, entry.name, say)
            finally:
                slot.unload()


def _loaded(
    slot: EngineSlot, registry: ModelRegistry, place: Path, name: str, say: Callable[[str], None]
) -> Iterator[Finding]:
    subject = "load"
    began = time.monotonic()
    try:
        host, info = slot.take(registry.get(name), say)
    except (EngineError, BatchAppError) as error:
        yield fail(subject, error.message, f"correct its entry in {place}")
        return
    took_s = time.monotonic() - began
    yield ok(
        subject,
        f"{name}: {took_s:.1f} s, {info.engine} {info.engine_version} on {info.device}: "
        f"{info.max_num_seqs:,} requests and {info.max_num_batched_tokens:,} tokens a step, "
        f"{info.kv_cache_tokens or 0:,} tokens of cache"
        + "".join(f", {fact} {value}" for fact, value in info.precision.items()),
    )
    if "/v1/completions" not in info.endpoints and info.engine == "vllm":
        return
    subject = "ask"
    try:
        host.submit([EngineRequest(0, "/v1/completions", _QUESTION)])
        deadline = time.monotonic() + _ANSWER_S
        outcomes = host.collect(1.0)
        while not outcomes and time.monotonic() < deadline:
            outcomes = host.collect(1.0)
    except EngineError as error:
        yield fail(subject, error.message, "submit a batch, and read data/logs/engine.log")
        return
    if outcomes and is_success(outcomes[0].status_code):
        yield ok(subject, f"{name} answered with {outcomes[0].completion_tokens} tokens")
    else:
        code = outcomes[0].status_code if outcomes else f"nothing in {_ANSWER_S:.0f} s"
        yield fail(subject, f"answered {code}", "submit a batch, and read its results' errors")
