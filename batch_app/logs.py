"""What the processes print: text for a terminal, or one JSON object a line for a collector.

Neither ever has a prompt or an answer in it. Of an exception that is none of ours they have the
kind and the place, not the text, which may repeat what somebody sent. A batch's own log, for its
owner, is `batch_log`.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any

from batch_app.errors import BatchAppError
from batch_app.json_lines import escape_line_separators

_BATCH_ID = re.compile(r"\bbatch_[0-9a-f]{24}\b")
_ACCESS = "uvicorn.access"
_POLLED = re.compile(
    r"/(?:v1/batches(?:/[^/?]+(?:/logs)?)?|health|livez|readyz|metrics|events|static/.*)(?:\?.*)?"
)
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
            line["exception"] = record.exc_text or self.formatException(record.exc_info)
        text = json.dumps(line, ensure_ascii=False, default=str)
        return escape_line_separators(text.encode(errors="surrogatepass")).decode(
            errors="surrogatepass"
        )


_is_json = False
_is_on_stderr = False
_keeps_texts_out = False


def keep_texts_out() -> None:
    """From here on, whatever logs an exception, and whatever thread dies of one, leaves out what
    `told` does."""
    global _keeps_texts_out
    if _keeps_texts_out:
        return
    _keeps_texts_out = True
    make_record = logging.getLogRecordFactory()

    def make(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make_record(*arguments, **named)
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = told(record.exc_info[1])  # formatters take it as it is
        return record

    def on_end_of_thread(end: threading.ExceptHookArgs) -> None:
        name = end.thread.name if end.thread else "A thread"
        logger.error("%s ended.", name, exc_info=end.exc_value)

    logging.setLogRecordFactory(make)
    threading.excepthook = on_end_of_thread


def told(error: BaseException) -> str:
    """Kind and place of an exception, and of those that led to it. The text, only where it is ours
    or the operating system's."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    parts = []
    for each in reversed(chain):
        text = f": {each}" if isinstance(each, BatchAppError | OSError) else ""
        parts += traceback.format_tb(each.__traceback__)
        parts.append(f"{type(each).__module__}.{type(each).__qualname__}{text}\n")
        if isinstance(each, BaseExceptionGroup):
            parts += [f"{told(inner)}\n" for inner in each.exceptions]
    return "".join(parts).rstrip("\n")


def say_on_stderr() -> None:
    """From now on: where standard output is for data."""
    global _is_on_stderr
    _is_on_stderr = True


def set_up(log_format: str) -> None:
    """Decide what this process prints; called once, at its start."""
    keep_texts_out()
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
    out = sys.stderr if _is_on_stderr else sys.stdout
    out.write(f"{text}\n")
    out.flush()


def say_error(text: str) -> None:
    """Why the process can't go on."""
    if _is_json:
        logger.error("%s", text.removeprefix("❌ "))
        return
    sys.stderr.write(f"{text}\n")


class Polling(logging.Filter):
    """Lets through what isn't asked again and again, or didn't go well: whoever waits for a batch
    would fill the terminal with its status."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return True
        _, method, path, _, status = record.args
        is_well = isinstance(status, int) and status < 400
        return not (is_well and method in ("GET", "HEAD") and _POLLED.fullmatch(str(path)))


def server_config(uvicorn_config: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's own configuration of logging, with our loggers in it."""
    config = copy.deepcopy(uvicorn_config)
    config["loggers"]["batch_app"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    if _is_json:
        for formatter in config["formatters"]:
            config["formatters"][formatter] = {"()": JsonFormatter}
    else:
        config["filters"] = {"polling": {"()": Polling}}
        config["loggers"][_ACCESS]["filters"] = ["polling"]
    return config
