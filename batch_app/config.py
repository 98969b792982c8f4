"""Settings: defaults < `vllm-batch.toml` < environment `VLLM_BATCH_*` < command-line flags.

`Settings()` reads the first three; a flag is passed as an argument (`Settings(port=9000)`). Each
field's description states unit, default and special values; `docs/settings.md` is made from them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from batch_app.errors import ConfigError

CONFIG_FILE_VARIABLE = "VLLM_BATCH_CONFIG"
DEFAULT_CONFIG_FILE = "vllm-batch.toml"

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

#: A host's name: labels of which the last isn't a number, so that no IP address is one.
HOST = re.compile(r"(?:[a-z0-9-]{1,63}\.)+[a-z][a-z0-9-]{0,62}")


def _expand(path: Path) -> Path:
    return path.expanduser()


def _split(value: object) -> object:
    """`a, b` as the environment has it, or a list as TOML has it."""
    if isinstance(value, str):
        return tuple(part for part in (piece.strip() for piece in value.split(",")) if part)
    return value


ExpandedPath = Annotated[Path, AfterValidator(_expand)]


class Settings(BaseSettings):
    """Everything an operator may set. Unknown keys are refused, so a typo can't pass unseen."""

    model_config = SettingsConfigDict(env_prefix="VLLM_BATCH_", extra="forbid", frozen=True)

    # Where things lie
    data_dir: ExpandedPath = Field(
        Path("./data"), description="Folder of uploads, results, logs and the SQLite database."
    )
    database_url: str = Field(
        "",
        description="URL of the database: `postgresql://user:password@host/name` (needs the extra "
        "`postgres`; see docs/postgresql.md) or `sqlite:////folder/file.db`. Empty: SQLite at "
        "`<data_dir>/database/batch_jobs.db`.",
    )
    storage_url: str = Field(
        "",
        description="URL of an object store for inputs, results and logs, so that servers and "
        "workers on several machines share no folder: `s3://bucket/prefix`, `gs://…`, `az://…` or "
        "`file:///folder` (needs the extra `objects`; see docs/object_storage.md). Empty: they are "
        "in the data folder only.",
    )
    storage_part_bytes: int = Field(
        8 * MIB,
        ge=5 * MIB,
        description="With `storage_url`: larger files are sent in parts of so many bytes, and "
        "results of a running batch as soon as there are so many. Default 8 MiB.",
    )
    storage_copy_interval_s: float = Field(
        10.0,
        gt=0,
        description="With `storage_url`: seconds between copies of a running batch's new results "
        "to the object store. The loss of a machine costs what was computed since.",
    )
    storage_cache_bytes: int = Field(
        50 * GIB,
        ge=0,
        description="With `storage_url`: how much of it the data folder keeps as a cache, in "
        "bytes; beyond that, what was used longest ago is removed from this machine. Default "
        "50 GiB; 0: no limit.",
    )
    storage_link_s: int = Field(
        300,
        ge=0,
        le=7 * 86400,
        description="With `storage_url`: seconds for which a download link to the object store "
        "is good, where a client asks for one. 0: none are given.",
    )
    models: ExpandedPath = Field(
        Path("./models.toml"), description="The model registry (TOML). See docs/models.md."
    )
    benchmarks_dir: ExpandedPath = Field(
        Path("./benchmarks/metadata"),
        description="Folder of benchmark records: read for estimates, one added a finished batch.",
    )

    log_format: Literal["text", "json"] = Field(
        "text",
        description="What server and worker print: `text`, or `json`, one object a line with "
        "`time`, `level`, `logger`, `message`, `batch_id`.",
    )

    otlp_endpoint: str = Field(
        "",
        description="Base URL of an OpenTelemetry collector (`http://localhost:4318`) that gets "
        "traces of batches; needs the extra `tracing`. Empty: what `OTEL_EXPORTER_OTLP_ENDPOINT` "
        "says, else none.",
    )

    # API server
    host: str = Field("127.0.0.1", description="Address the API server listens on.")
    port: int = Field(8080, ge=0, le=65535, description="Port of the API server; 0 picks one.")
    no_auth: bool = Field(
        False,
        description="Ask nobody for an API key, on any address: whoever reaches the server may "
        "then use the GPU and read all results. See docs/security.md.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Host names, separated by commas, that requests may ask for besides this "
        "machine's own (`localhost`, 127.0.0.1). Empty: any, where API keys or `no_auth` let "
        "others in; else none.",
    )
    session_s: int = Field(
        12 * 3600,
        gt=0,
        description="Seconds after which a browser that signed in to the pages has to do so again. "
        "Default 12 hours.",
    )
    audit_max_bytes: int = Field(
        16 * MIB,
        gt=0,
        description="Length, in bytes, at which a new file of the audit log is begun. Ten are "
        "kept.",
    )
    max_unfinished_batches: int = Field(
        1000,
        ge=0,
        description="Most batches of one API key (of all together, without keys) that have not "
        "finished; further ones are refused with 429. 0 means no limit.",
    )
    max_open_uploads: int = Field(
        32,
        gt=0,
        description="Most uploads of one API key (of all together, without keys) that may be on "
        "their way at once; further ones are refused with 429.",
    )
    client_timeout_s: float = Field(
        30.0,
        gt=0,
        description="Seconds that the server waits for a request's headers, and for each next "
        "piece of its body.",
    )
    min_upload_bytes_per_s: int = Field(
        1024,
        ge=0,
        description="Slowest upload that is put up with, in bytes per second, on average after "
        "`client_timeout_s`. 0 means any.",
    )
    min_free_bytes: int = Field(
        256 * MIB,
        ge=0,
        description="With less room than this on the data folder's disk, in bytes, the server "
        "refuses uploads and calls itself not ready. Default 256 MiB; 0: never.",
    )
    max_upload_bytes: int = Field(
        20 * GIB, gt=0, description="Largest accepted upload, in bytes. Default 20 GiB."
    )
    max_line_bytes: int = Field(
        8 * MIB, gt=0, description="Longest accepted line of an input file, in bytes."
    )
    max_requests_per_batch: int = Field(
        0, ge=0, description="Most requests in one batch; 0 means no limit."
    )
    check_processes: int = Field(
        0,
        ge=0,
        description="Most processes that check the lines of large uploads, for all of them "
        "together, each file up to 4; 0: one for each core. With 1, the API server's own threads "
        "do.",
    )
    max_line_errors: int = Field(
        100, gt=0, description="How many line errors a refused file reports; the rest are counted."
    )

    # Webhooks
    webhook_allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Host names, addresses and networks (`10.1.0.0/16`), separated by commas, that "
        "webhooks may go to although they are not public, and by http. Empty: public addresses by "
        "https only.",
    )
    webhook_ca_file: ExpandedPath | None = Field(
        None,
        description="File of certificates (PEM) that webhooks' hosts are trusted by besides the "
        "usual ones, for an authority of your own.",
    )
    webhook_timeout_s: float = Field(
        20.0, gt=0, le=60, description="Seconds that a webhook's host gets for each attempt."
    )
    webhook_backoff_s: float = Field(
        5.0,
        gt=0,
        description="Seconds before the second attempt; each further pause is three times as "
        "long, up to 12 hours, give or take a quarter.",
    )
    webhook_attempts: int = Field(
        16, gt=0, description="Attempts, after which an event is given up; 16 take three days."
    )
    max_webhooks: int = Field(
        20,
        gt=0,
        description="Most webhooks of one API key (of all together, without keys), those of single "
        "batches not counted.",
    )

    # How long things are kept
    retention_input_s: int = Field(
        0,
        ge=0,
        description="Seconds after its upload that an input file is removed, unless a batch that "
        "has not finished needs it: then once that has. An `expires_after` of its own may come "
        "earlier, not later. 0: kept for ever.",
    )
    retention_output_s: int = Field(
        0,
        ge=0,
        description="Seconds after the end of a batch that its results are removed. An "
        "`output_expires_after` of its own may come earlier, not later. 0: kept for ever.",
    )
    retention_log_s: int = Field(
        0,
        ge=0,
        description="Seconds after the end of a batch that its log is removed. 0: kept for ever.",
    )
    retention_webhook_s: int = Field(
        30 * 86400,
        ge=0,
        description="Seconds after its last attempt that a settled delivery of a webhook is "
        "forgotten. 0: kept for ever.",
    )

    # What one request may ask for
    max_n: int = Field(128, gt=0, description="Largest `n` of a request: answers to one prompt.")
    max_logprobs: int = Field(
        20, ge=0, description="Largest `top_logprobs`, `prompt_logprobs` or `logprobs` count."
    )
    max_output_tokens: int = Field(
        1 << 20, gt=0, description="Largest `max_tokens` of a request, in tokens."
    )
    max_inputs: int = Field(
        2048,
        gt=0,
        description="Most prompts, inputs or documents in one request; for completions, `n` times "
        "the prompts.",
    )
    max_messages: int = Field(
        4096,
        gt=0,
        description="Most messages in one request. A chat template takes longer with each, and "
        "other requests wait for it meanwhile.",
    )
    max_stop: int = Field(16, ge=0, description="Most `stop` strings of a request.")
    max_stop_chars: int = Field(256, gt=0, description="Longest `stop` string, in characters.")
    max_tools: int = Field(128, ge=0, description="Most `tools` of a request.")
    max_schema_bytes: int = Field(
        64 * KIB,
        gt=0,
        description="Largest JSON Schema (of a tool or a response format) or grammar, in bytes; "
        "also the choices of `structured_outputs.choice` together. The tools of a request may take "
        "four times as much together.",
    )
    max_schema_depth: int = Field(
        32, gt=0, le=200, description="Deepest JSON Schema, in levels of nesting."
    )
    max_regex_chars: int = Field(
        4096, gt=0, description="Longest regular expression, in characters."
    )
    max_media_bytes: int = Field(
        8 * MIB, gt=0, description="Largest image in a `data:` URL, in bytes of the URL."
    )
    media_domains: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        (),
        description="Host names, separated by commas, that images may be loaded from. Empty: "
        "images come in `data:` URLs only. IP addresses can't be named.",
    )

    # Worker
    poll_interval_s: float = Field(
        10.0,
        gt=0,
        description="Seconds between looks at an empty queue. A new batch wakes the worker at "
        "once where both share the data folder or PostgreSQL; this is the fallback.",
    )
    pause_first_s: float = Field(
        1.0,
        gt=0,
        description="Seconds until a paused batch is tried again. Each further pause without "
        "progress is twice as long; where trying costs a load of the model, 30 times as long.",
    )
    pause_longest_s: float = Field(
        60.0, gt=0, description="The longest of these pauses, before the factor of 30."
    )
    lease_s: float = Field(
        30.0, gt=1, description="Seconds after which a silent worker's batch may be taken over."
    )
    heartbeat_s: float = Field(
        5.0, gt=0, description="Seconds between a worker's signs of life. Well below `lease_s`."
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        description="At shutdown: seconds that requests in flight get to finish; those that "
        "don't are given back and run again by the next worker.",
    )
    commit_interval_s: float = Field(
        0.25,
        gt=0,
        description="Seconds between commits of results to disk: what a crash may cost, and how "
        "often progress moves.",
    )
    progress_interval_s: float = Field(
        0.0,
        ge=0,
        description="Seconds, at least, between two tellings of a batch's progress to the "
        "database; 0: as often as results are committed. Where hundreds of workers share one "
        "database, a few seconds spare it most of its work; at `heartbeat_s` it is told anyway.",
    )
    progress_log_s: float = Field(
        5.0, gt=0, description="Seconds between progress lines in a batch's log."
    )
    idle_unload_s: float = Field(
        600.0,
        ge=0,
        description="Seconds without work after which the model is unloaded; 0: never.",
    )
    window_factor: float = Field(
        2.0,
        ge=1,
        description="Requests kept in flight, as a multiple of the engine's `max_num_seqs`.",
    )
    prepare_ahead: int = Field(
        2048,
        ge=0,
        description="Requests that are rendered and tokenised while their model loads, as far as "
        "there is time; 0: none.",
    )
    order: Literal["prefix", "arrival"] = Field(
        "prefix",
        description="Order of a batch's requests. `prefix`: those whose prompts begin alike one "
        "after the other, long answers early; `arrival`: as they stand in the file.",
    )
    deduplicate: bool = Field(
        True,
        description="Compute byte-identical requests once where the answer is determined by the "
        "request (temperature 0 or a seed, one choice). A batch can opt out; false: never.",
    )
    max_passed_over_s: float = Field(
        600.0,
        ge=0,
        description="Longest time, in seconds, that a batch may be passed over by younger ones "
        "for the model that is loaded already; 0 makes the queue plain first in, first out.",
    )
    engine_start_timeout_s: float = Field(
        1800.0, gt=0, description="Seconds a model may take to load before it counts as failed."
    )
    engine_hang_s: float = Field(
        300.0,
        gt=0,
        description="Seconds without any token progress, with requests in flight, after which "
        "the engine is killed and started again. Up to four times as long where a step of the "
        "engine takes so long at the pace seen so far.",
    )
    engine_network: Literal["isolated", "host"] = Field(
        "isolated",
        description="Network of the engine process. `isolated`: one of its own, so that nobody "
        "outside reaches what listens in it, except where it has to reach others: with "
        "`media_domains`, or a model that is spread over several machines. Where the kernel "
        "refuses, the worker warns and goes on. `host`: the machine's.",
    )
    max_engine_restarts: int = Field(
        5,
        ge=0,
        description="Restarts of the engine in one batch without a single result in between, "
        "after which the batch is paused. The search for a request that kills it has restarts of "
        "its own, as many as it takes to find one in a window.",
    )
    engine_backoff_s: float = Field(
        1.0,
        ge=0,
        description="Seconds before the second restart in a row; each further one waits twice as "
        "long, up to a minute.",
    )

    @field_validator("media_domains")
    @classmethod
    def _hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST.fullmatch(host) or host.endswith("localhost"):
                raise ValueError(f"{host!r} is not the lower-case name of a public host")
        return hosts

    @property
    def resolved_database_url(self) -> str:
        if self.database_url:
            return self.database_url
        return f"sqlite:///{self.sqlite_file}"

    @property
    def sqlite_file(self) -> Path:
        """Where the database is, unless `database_url` names another."""
        return self.data_dir / "database" / "batch_jobs.db"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml_file = Path(os.environ.get(CONFIG_FILE_VARIABLE, DEFAULT_CONFIG_FILE))
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file))


def load_settings(**flags: object) -> Settings:
    """Settings with these flags on top; a flag that is None counts as not given.

    Raises:
        ConfigError: a value can't be used; the message names each setting and what's wrong.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise ConfigError(f"Settings cannot be used: {problems}") from error
    except ValueError as error:  # a TOML file that does not parse
        raise ConfigError(f"The settings file cannot be read: {error}") from error
