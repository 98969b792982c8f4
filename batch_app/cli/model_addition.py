"""`vllm-batch models add`: propose a registry entry for a model, and write it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_app.cli.options import Json, Models
from batch_app.cli.terminal import say, show_json
from batch_app.errors import BadRequest

if TYPE_CHECKING:
    from batch_app.model_description import ModelDescription
    from batch_app.proposal.entry import Proposal
    from batch_app.registry import ModelEntry

RESTART = "Start the API server again, so that it knows. (The worker looks by itself.)"


class Engine(StrEnum):
    VLLM = "vllm"
    RAY = "ray"
    SIM = "sim"


def add(
    model: Annotated[
        str,
        typer.Argument(
            metavar="HUB_ID_OR_FOLDER",
            help="The model: its id on the model hub, as ORGANISATION/NAME, or its folder. With "
            "--source, --path, or another --engine than vllm: what requests call it.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="What requests call it.", show_default="the id, or the folder's name"
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Write the proposed entry without asking.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="Its id on the model hub. The entry is written as given, the hub isn't asked.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--path", help="The folder of its files, likewise as given.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit on the hub.", show_default="the hub's default branch"
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", help="Another name; may be repeated.")
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-arg",
            "-e",
            metavar="NAME=VALUE",
            help="An argument by vLLM's own name, as max_model_len=8192, instead of the proposed "
            "value; may be repeated.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the Python code that comes with the model."),
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            help="ray: replicas on a Ray cluster, as -e 'ray={\"max_replicas\": 8}' says; "
            "sim: the simulated engine, which runs no model."
        ),
    ] = Engine.VLLM,
    models: Models = None,
    as_json: Json = False,
) -> None:
    """Add a model to the registry. The rest of the file stays as it is.

    Reads the model's configuration, tokenizer settings and chat template before any weights, and
    proposes an entry: the tool-call and reasoning parsers, a max_model_len that fits this machine,
    the dtype. Asks before it writes.
    """
    from batch_app.config import load_settings
    from batch_app.registry import ModelEntry
    from batch_app.registry_file import RegistryFile, engine_argument

    file = RegistryFile(load_settings(models=models).models)
    if path is not None and source is not None:
        raise typer.BadParameter("Give --source or --path, not both.")
    arguments = dict(engine_argument(text) for text in engine_arg or ())
    proposes = source is None and path is None and engine is Engine.VLLM
    place = _Place.of(model) if proposes else None
    entry: dict[str, Any] = {"name": name or (place.name if place else model)}
    # Before the hub is asked.
    file.check_names([entry["name"], *(alias or ())])
    entry["source"] = source or model
    folder = path or (place.folder if place else None)
    if folder is not None:
        entry["source"] = _folder(folder, file.path.parent, checked=path is not None)
    elif engine is Engine.SIM:
        entry["source"] = "sim"
    if revision is not None:
        entry["revision"] = revision
    if alias:
        entry["aliases"] = alias
    if engine is not Engine.VLLM:
        entry["engine"] = engine.value
    if trust_remote_code:
        entry["trust_remote_code"] = True
    proposal = None
    if place is not None:
        proposal = _proposed(place, revision, arguments)
        if proposal.chat_template_kwargs:
            entry["chat_template_kwargs"] = proposal.chat_template_kwargs
        arguments = proposal.engine_args
    if arguments:
        entry["engine_args"] = arguments
    if proposal is not None:
        _show(entry, proposal)
        _confirm(file.path, yes=yes)
    file.add(entry)
    say(f"✅ {entry['name']} is in {file.path}. {RESTART}")
    say(f"   Could it run here? vllm-batch models check {entry['name']}")
    if as_json:
        show_json(facts(ModelEntry.model_validate(entry)) | _proposal_body(proposal))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model is: in a `folder`, or on the hub under `text`."""

    text: str
    folder: Path | None

    @classmethod
    def of(cls, text: str) -> _Place:
        """Raises BadRequest where the text looks like a folder that isn't there."""
        folder = Path(text).expanduser()
        if folder.is_dir():
            return cls(text, folder)
        if folder.is_file():
            from batch_app.gguf import FIX_GGUF, gguf_problem

            problem = gguf_problem(text, [folder.name])
            if problem is not None:
                raise BadRequest(f"{problem}. Instead, {FIX_GGUF}.")
            raise BadRequest(f"{text} is a file. Name the model's folder.")
        if text.startswith(("/", ".", "~")) or text.count("/") > 1:
            raise BadRequest(f"There is no folder {text}.")
        return cls(text, None)

    @property
    def name(self) -> str:
        return self.text if self.folder is None else self.folder.resolve().name


def _proposed(place: _Place, revision: str | None, arguments: dict[str, Any]) -> Proposal:
    from batch_app.machine import this_machine
    from batch_app.proposal.entry import propose

    return propose(_described(place, revision), this_machine(), arguments)


def _described(place: _Place, revision: str | None) -> ModelDescription:
    from batch_app.datasheets import local_folder
    from batch_app.model_description import read_folder
    from batch_app.proposal.hub import read_hub
    from batch_app.registry import ModelEntry

    if place.folder is not None:
        return read_folder(place.folder)
    kept = local_folder(ModelEntry(name=place.text, source=place.text, revision=revision))
    if kept is not None and (kept / "config.json").is_file() and any(kept.glob("*.safetensors")):
        return read_folder(kept)
    say(f"Reading the small files of {place.text} on the model hub (no weights yet) …")
    return read_hub(place.text, revision)


def _show(entry: dict[str, Any], proposal: Proposal) -> None:
    """Show the proposal, on standard error, as the registry would have it."""
    from batch_app.doctor.finding import size
    from batch_app.registry_file import entry_text

    say(f"\n{entry_text(entry)}")
    width = max(len(one.field) for one in proposal.values)
    for one in proposal.values:
        value = "-" if one.value is None else str(one.value)
        say(f"  {one.field.ljust(width)}  {value}: {one.reason}")
    if proposal.download_bytes:
        say(
            f"  {'download'.ljust(width)}  {size(proposal.download_bytes)}, when a batch first "
            "needs the model"
        )
    for warning in proposal.warnings:
        say(f"⚠️  {warning}")


def _confirm(path: Path, *, yes: bool) -> None:
    """Raises typer.Abort on a no, typer.BadParameter where nobody can be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("Nothing was written: add --yes to write this entry.")
    typer.confirm(f"Add this to {path}?", default=True, abort=True, err=True)


def _proposal_body(proposal: Proposal | None) -> dict[str, Any]:
    if proposal is None:
        return {}
    return {
        "reasons": {one.field: one.reason for one in proposal.values},
        "warnings": list(proposal.warnings),
        "download_bytes": proposal.download_bytes,
    }


def facts(entry: ModelEntry) -> dict[str, Any]:
    """An entry as JSON, with the folder of its files if they are on this machine."""
    from batch_app.datasheets import local_folder

    folder = None if entry.engine == "sim" else local_folder(entry)
    return {**entry.model_dump(mode="json"), "folder": str(folder) if folder else None}


def _folder(path: Path, base: Path, *, checked: bool) -> str:
    """As the registry names it: relative to its own folder where it lies beneath.

    `checked`: whether it must hold a model. Raises BadRequest.
    """
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise BadRequest(f"There is no folder {path}.", param="--path")
    if checked and not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise BadRequest(f"{path} holds no model: it has no config.json.", param="--path")
    return str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)
