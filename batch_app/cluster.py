"""The Ray cluster that a model runs on, where the engine is `ray`: what the registry says of it.

```toml
[[model]]
name = "qwen3-32b"
engine = "ray"
source = "Qwen/Qwen3-32B"        # a hub id, or a folder that every node has
[model.engine_args]              # of each replica, as for `engine = "vllm"`
tensor_parallel_size = 2
[model.engine_args.ray]
address = "10.0.0.5:6379"
max_replicas = 8
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from batch_app.errors import ConfigError

#: The table among `engine_args` that is Ray's; all the others go to the replicas' engine.
TABLE = "ray"
#: What must not be shown to those who may only use the model.
PRIVATE = ("address",)
_ADDRESS = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")


class RayCluster(BaseModel):
    """The table `ray` of such a model's `engine_args`. Times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: `HOST:PORT` of the cluster's head; `auto`: the cluster that this machine is a node of.
    address: str = "auto"
    #: What runs in a replica.
    engine: Literal["vllm", "sim"] = "vllm"
    #: So many are kept as long as there is work; with more work than they take, up to the most.
    min_replicas: int = Field(1, ge=1, le=1024)
    max_replicas: int = Field(1, ge=1, le=1024)
    #: What each takes of its node. GPUs: as many as its engine spreads a model over, unless given.
    num_gpus: float | None = Field(None, ge=0)
    num_cpus: float = Field(1.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    #: How long a batch waits for a replica to find a node, before it pauses; and then for the
    #: others of the fewest, before it begins without them.
    room_timeout_s: float = Field(600.0, gt=0)
    #: From a replica's place on a node to its loaded model.
    start_timeout_s: float = Field(1800.0, gt=0)
    #: A replica that makes no token for so long is replaced.
    hang_s: float = Field(300.0, gt=0)
    #: A replica without work is given back after this, down to `min_replicas`.
    idle_s: float = Field(60.0, gt=0)

    @classmethod
    def of(cls, engine_args: Mapping[str, Any]) -> RayCluster:
        """Raises ConfigError."""
        table = engine_args.get(TABLE, {})
        if not isinstance(table, Mapping):
            raise ConfigError("engine_args.ray is a table: [model.engine_args.ray]")
        try:
            return cls.model_validate(dict(table))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in (TABLE, *first["loc"]))
            said = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"engine_args.{where}: {said}") from None

    @field_validator("address")
    @classmethod
    def _is_a_head(cls, text: str) -> str:
        if text == "auto" or _ADDRESS.fullmatch(text):
            return text
        if text.startswith("ray://"):
            raise ValueError(
                "the worker's machine must be a node of the cluster; Ray Client is not supported. "
                "Say auto, or the head's address, as 10.0.0.5:6379"
            )
        raise ValueError("it is auto, or the head's address, as 10.0.0.5:6379")

    @field_validator("resources")
    @classmethod
    def _are_positive(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU"):
                raise ValueError(f"say num_{name.lower()}s instead of {name}")
            if amount <= 0:
                raise ValueError(f"{name} must be more than 0")
        return resources

    @model_validator(mode="after")
    def _fits_together(self) -> RayCluster:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is larger than max_replicas")
        return self

    @property
    def longest_start_s(self) -> float:
        """Of a replica that has its place: the model's files may have to come from the hub, which
        has as long as the loading."""
        return 2 * self.start_timeout_s

    @property
    def longest_load_s(self) -> float:
        """Until the first replicas are there, if all goes as slowly as it may."""
        return 2 * (self.room_timeout_s + self.longest_start_s)

    def gpus(self, engine_args: Mapping[str, Any]) -> float:
        """That each replica takes of its node."""
        if self.num_gpus is not None:
            return self.num_gpus
        if self.engine == "sim":
            return 0.0
        given = {name.replace("-", "_"): value for name, value in engine_args.items()}
        sizes = [given.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
        product = 1
        for size in sizes:
            product *= size if isinstance(size, int) and size > 0 else 1
        return float(product)


def auth_token(environment: Mapping[str, str]) -> str:
    """Ray's token where this environment gives one by Ray's own names; empty where it doesn't.

    Raises ConfigError where the file that is named can't be read.
    """
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = environment.get("RAY_AUTH_TOKEN_PATH", "")
    if not path:
        return ""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise ConfigError(f"The file of RAY_AUTH_TOKEN_PATH can't be read: {reason}.") from None


def replica_args(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """What goes to the engine inside each replica."""
    return {name: value for name, value in engine_args.items() if name != TABLE}
