"""The flags of vLLM's `run-batch` on the command line of `vllm-batch run`.

They are told from our own, and become arguments of the engine. Those that mean nothing here are
taken with a note, those that would mean something else are refused: docs/run.md lists both.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batch_app.engine.vllm_flags import Flag, Takes, known_flags
from batch_app.errors import BadRequest

_NO_METRICS = "it serves no metrics; a server has them at /metrics"
_NO_LOG_OF_TEXTS = "prompts and answers are never logged"
_OWN_LOG = "the engine's log is in OUTPUT.work/logs, and goes with it"
_ONE_ENGINE = (
    "it runs one engine on one machine; to share a model between its GPUs there is "
    "--tensor-parallel-size"
)
#: Taken, without effect.
WITHOUT_EFFECT: Mapping[str, str] = {
    "aggregate_engine_logging": _OWN_LOG,
    "disable_log_requests": _NO_LOG_OF_TEXTS,
    "disable_log_stats": "progress and estimates need them; they are printed nowhere",
    "download_dir": "models go to the hub's cache; HF_HOME moves that",
    "enable_metrics": _NO_METRICS,
    "host": _NO_METRICS,
    "log_config_file": _OWN_LOG,
    "log_level": _OWN_LOG,
    "logging_config": _OWN_LOG,
    "max_log_len": _NO_LOG_OF_TEXTS,
    "output_tmp_dir": "the output is written beside its place, in OUTPUT.work",
    "port": _NO_METRICS,
    "url": _NO_METRICS,
}
#: Refused, unless it is what is so anyhow (`--no-…`, `--data-parallel-size 1`).
REFUSED: Mapping[str, str] = {
    "config": "give the flags that the file holds",
    "data_parallel_size": _ONE_ENGINE,
    "enable_log_deltas": _NO_LOG_OF_TEXTS,
    "enable_log_outputs": _NO_LOG_OF_TEXTS,
    "enable_log_requests": _NO_LOG_OF_TEXTS,
    "hf_token": "others could read it off the command line; set HF_TOKEN instead",
    "lora_modules": "all requests run on the one model that --model names",
    "nnodes": _ONE_ENGINE,
}
#: Flags that vLLM had once, and scripts still give.
_FORMER: Mapping[str, Flag] = {
    "--config": Flag("config", Takes.ONE),
    "--disable-log-requests": Flag("disable_log_requests", Takes.NONE),
}
_NUMBER = re.compile(r"-\d")


@dataclass(slots=True)
class EngineFlags:
    """What the engine is told. `served_names`: what it is to call the model in answers, if said.
    `notes`: for the person, of flags without effect."""

    engine_args: dict[str, Any] = field(default_factory=dict)
    served_names: tuple[str, ...] = ()
    revision: str | None = None
    trust_remote_code: bool | None = None
    notes: list[str] = field(default_factory=list)


def take_flags(words: Sequence[str], own: Mapping[str, bool]) -> tuple[list[str], EngineFlags]:
    """Tell vLLM's flags from the rest of a command line. Returns the rest, and what they say.

    `own`: our options, and whether a value follows.

    Raises:
        BadRequest: vLLM has no such flag, its value is missing, or it is refused here.
    """
    reader = _Reader(words, own)
    return reader.rest, _engine_flags(reader.given)


class _Reader:
    """One pass over the words. `given` holds True, False, a word, a list of words, or a dict."""

    def __init__(self, words: Sequence[str], own: Mapping[str, bool]) -> None:
        self.rest: list[str] = []
        self.given: dict[str, Any] = {}
        self._words = deque(words)
        self._own = own
        self._known = known_flags()
        while self._words:
            self._read(self._words.popleft())

    def _read(self, word: str) -> None:
        if word == "--":
            self.rest += [word, *self._words]
            self._words.clear()
        elif not word.startswith("-") or word == "-":
            self.rest.append(word)
        else:
            self._read_option(word)

    def _read_option(self, word: str) -> None:
        option, keys, value = _parts(word)
        if option in self._own:
            self.rest.append(option if value is None else f"{option}={value}")
            if self._own[option] and value is None and self._words:
                self.rest.append(self._words.popleft())
            return
        flag = _FORMER.get(option) or self._known.get(option)
        if flag is None and not word.startswith("--") and word[:2] in self._own:
            self.rest.append(word)  # a short one of ours, with its value
            return
        if keys:
            self._read_part((flag or self._guess(option)).name, word, keys, value)
            return
        flag = flag or self._guess(option)
        if flag.takes is Takes.NONE:
            if value is not None:
                raise BadRequest(f"The flag {option} takes no value.")
            self.given[flag.name] = not flag.negated
        elif flag.takes is Takes.ONE:
            self.given[flag.name] = self._value(option) if value is None else value
        else:
            self.given[flag.name] = self._values(option) if value is None else [value]

    def _value(self, option: str) -> str:
        if not self._has_value():
            raise BadRequest(f"The flag {option} needs a value.")
        return self._words.popleft()

    def _values(self, option: str) -> list[str]:
        values = [self._value(option)]
        while self._has_value():
            values.append(self._words.popleft())
        return values

    def _has_value(self) -> bool:
        if not self._words:
            return False
        word = self._words[0]
        return not word.startswith("-") or word == "-" or _NUMBER.match(word) is not None

    def _read_part(self, name: str, word: str, keys: list[str], value: str | None) -> None:
        """`--name.key.key value`, a part of what is JSON as a whole."""
        read: Any = self._value(word) if value is None else value
        if keys[-1].endswith("+"):
            keys[-1] = keys[-1].removesuffix("+")
            read = read.split(",")
        else:
            with contextlib.suppress(ValueError):  # a word
                read = json.loads(read)
        place = self.given.setdefault(name, {})
        if isinstance(place, str):
            try:
                place = self.given[name] = json.loads(place)
            except ValueError:
                place = None
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise BadRequest(f"The flag {word} contradicts another one.")
        before = place.get(keys[-1])
        both = isinstance(before, list) and isinstance(read, list)
        place[keys[-1]] = before + read if both else read

    def _guess(self, option: str) -> Flag:
        """A flag that vLLM isn't known to have: refused, unless nothing is known of this vLLM."""
        if self._known:
            raise BadRequest(_unknown(option, [*self._known, *self._own]))
        name = option.lstrip("-")
        if name.startswith("no-"):
            return Flag(name.removeprefix("no-").replace("-", "_"), Takes.NONE, negated=True)
        takes = Takes.ONE if self._has_value() else Takes.NONE
        return Flag(name.replace("-", "_"), takes)


def _parts(word: str) -> tuple[str, list[str], str | None]:
    """Option, the keys after its dots, and the value after `=`; in vLLM's other spellings, too."""
    if word.startswith("-O"):
        return "--optimization-level", [], word[2:].removeprefix("=") or None
    name, equals, value = word.partition("=")
    option, *keys = name.split(".")
    if option.startswith("--"):
        option = "--" + option[2:].replace("_", "-")
    return option, keys, value if equals else None


def _unknown(option: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.75)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"Neither vllm-batch run nor vLLM's run-batch has a flag {option}.{hint}"


def _engine_flags(given: dict[str, Any]) -> EngineFlags:
    flags = EngineFlags()
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if name in WITHOUT_EFFECT:
            flags.notes.append(f"{option} has no effect here: {WITHOUT_EFFECT[name]}.")
        elif name in REFUSED:
            if value is not False and value != "1":
                raise BadRequest(f"The flag {option} is refused: {REFUSED[name]}.")
        elif name == "served_model_name":
            flags.served_names = tuple(value)
        elif name == "revision":
            flags.revision = value
        elif name == "trust_remote_code":
            flags.trust_remote_code = value
        else:
            flags.engine_args[name] = _argument(value)
    return flags


def _argument(value: Any) -> Any:
    """As a registry would hold it. Whatever isn't plainly a number, vLLM reads itself."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str):
        for kind in (int, float):
            try:
                number = kind(value)
            except ValueError:
                continue
            if str(number) == value:
                return number
    return value
