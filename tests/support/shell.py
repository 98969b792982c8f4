"""`vllm-batch` as a person types it, in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from batch_app.cli import app
from support.sdk import jsonl


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass(frozen=True)
class Shell:
    """A person in a folder, who has named the server once."""

    folder: Path
    url: str

    def __call__(self, *words: str, stdin: bytes | None = None) -> Said:
        done = CliRunner().invoke(
            app, list(words), input=stdin, env={"VLLM_BATCH_SERVER": self.url, "COLUMNS": "80"}
        )
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert "Traceback" not in done.stderr
        return Said(int(done.exit_code), done.stdout, done.stderr)

    def file(self, name: str, content: bytes | list[dict[str, Any]]) -> str:
        raw = content if isinstance(content, bytes) else jsonl(content)
        (self.folder / name).write_bytes(raw)
        return name

    def submitted(self, requests: list[dict[str, Any]], model: str = "sim") -> str:
        said = self("submit", self.file("sent.jsonl", requests), "--model", model, "--wait", "-q")
        assert said.code in (0, 8), said.err
        return said.out.strip()
