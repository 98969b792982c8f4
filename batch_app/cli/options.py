"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Host = Annotated[
    str | None, typer.Option(help="Address the API server listens on.", show_default="127.0.0.1")
]
Port = Annotated[
    int | None,
    typer.Option(
        help="Port of the API server; 0 picks one.", min=0, max=65535, show_default="8080"
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of uploads, results, logs and database.", show_default="./data"),
]
Models = Annotated[
    Path | None, typer.Option(help="The model registry.", show_default="./models.toml")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="SQLAlchemy URL of the database.", show_default="SQLite in the data folder"),
]
LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option(help="What is printed; json: one object a line.", show_default="text"),
]
LogJson = Annotated[bool, typer.Option("--json", help="The same as --log-format json.")]
NoAuth = Annotated[
    bool,
    typer.Option(
        "--no-auth", help="Let others in without API keys. Only in a network of your own."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
