"""What the processes print: text for a terminal, or one JSON object a line for a collector.

Neither ever has a prompt or an answer in it. A batch's own log, for its owner, is `batch_log`.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

_BATCH_ID = re.compile(r"\bbatch_[0-9a-f]{24}\b")
_ACCESS = "uvicorn.access"
logger = logging.getLogger("batch_app")


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger`, `message`, `batch_id` (null where the message names none), and
    `exception` where there was one. Of an access: `client`, `method`, `path`, `status`."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        batch = _BATCH_ID.search(message)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            "batch_id": batch[0] if batch else None,
        }
        if record.name == _ACCESS and isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, _, status = record.args
            line |= {"client": client, "method": method, "path": path, "status": status}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


_is_json = False


def set_up(log_format: str) -> None:
    """Decide what this process prints; called once, at its start."""
    global _is_json
    _is_json = log_format == "json"
    if _is_json:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter())
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        logging.captureWarnings(True)
    else:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would name whole URLs


def say(text: str, *, as_json: str | None = None) -> None:
    """Tell whoever watches the terminal; in JSON, `as_json` is said where that reads better."""
    if _is_json:
        logger.info("%s", as_json or text)
        return
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def say_error(text: str) -> None:
    """Why the process can't go on."""
    if _is_json:
        logger.error("%s", text.removeprefix("❌ "))
        return
    sys.stderr.write(f"{text}\n")


def server_config(uvicorn_config: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's own configuration of logging, with our loggers in it."""
    config = copy.deepcopy(uvicorn_config)
    config["loggers"]["batch_app"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    if _is_json:
        for formatter in config["formatters"]:
            config["formatters"][formatter] = {"()": JsonFormatter}
    return config
