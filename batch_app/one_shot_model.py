"""The model of a one-shot run: of the registry, or from outside of it, with flags on top.

The registry is what a server may run. Who starts a run of their own may name any model, as long as
they say plainly where it is: a folder, or `owner/name` on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batch_app.config import Settings
from batch_app.errors import BadRequest, ModelNotFound
from batch_app.policy import ANY
from batch_app.registry import ModelEntry, ModelRegistry


def one_shot_entry(
    model: str,
    settings: Settings,
    *,
    engine_args: Mapping[str, Any] | None = None,
    served_names: tuple[str, ...] = (),
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> ModelEntry:
    """The entry that a run loads: the registry's, if it has this model, else one made for it.

    What is given besides goes before what the registry says. `served_names`: the first is what
    answers call the model.

    Raises:
        ModelNotFound: it is neither in the registry, nor a folder or a hub's `owner/name`.
        BadRequest: it is a path to nothing.
        ConfigError: the registry can't be read.
    """
    registry = _registry(settings)
    entry = registry.get(model) if registry.knows(model) else _from_outside(model, registry)
    changes: dict[str, Any] = {"engine_args": {**entry.engine_args, **(engine_args or {})}}
    if served_names:
        changes |= {"name": served_names[0], "aliases": ()}
    if revision is not None:
        changes["revision"] = revision
    if trust_remote_code is not None:
        changes["trust_remote_code"] = trust_remote_code
    return entry.model_copy(update=changes)


def _registry(settings: Settings) -> ModelRegistry:
    """The registry; an empty one where there is none and nobody named one."""
    if "models" not in settings.model_fields_set and not settings.models.exists():
        return ModelRegistry([])
    return ModelRegistry.load(settings.models)


def _from_outside(model: str, registry: ModelRegistry) -> ModelEntry:
    path = Path(model).expanduser()
    if path.is_dir():
        source = str(path.resolve())
    elif path.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise BadRequest(f"There is no model folder {model}.", param="model")
    elif "/" in model.strip("/"):
        source = model
    else:
        known = ", ".join(entry.name for entry in registry.entries) or "none"
        raise ModelNotFound(
            f"The model {model[:200]!r} is not in the registry. Models there: {known}. For one "
            "that isn't, give its folder, or its name on the hub as owner/name.",
            param="model",
        )
    return ModelEntry(name=model, source=source, chat_template_kwargs=(ANY,))
