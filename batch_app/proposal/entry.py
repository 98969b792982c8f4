"""A registry entry proposed for a model, with a reason for each value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from batch_app.datasheets import size_of_config
from batch_app.doctor.finding import size
from batch_app.doctor.memory import FEWEST_TOKENS, cache_tokens, cpu_cache_bytes
from batch_app.machine import Machine
from batch_app.model_description import ModelDescription
from batch_app.parsers import tool_parser
from batch_app.proposal.hub import consent

#: GPUs before Ampere compute with float16, but not with bfloat16.
_WITHOUT_BFLOAT16 = ("V100", "T4", "P100", "P40", "RTX 2060", "RTX 2070", "RTX 2080", "GTX")
_GIVEN = "as given"


@dataclass(frozen=True, slots=True)
class Value:
    """A proposed value. `field`: of the entry, or of its `engine_args`. `value` None: left to vLLM,
    or not possible, as `reason` says."""

    field: str
    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `models add` would write: `values` go into the entry; `warnings` are for the reader."""

    values: tuple[Value, ...]
    warnings: tuple[str, ...]
    download_bytes: int

    @property
    def chat_template_kwargs(self) -> list[str]:
        found = [one.value for one in self.values if one.field == "chat_template_kwargs"]
        return list(found[0] or ()) if found else []

    @property
    def engine_args(self) -> dict[str, Any]:
        return {
            one.field: one.value
            for one in self.values
            if one.field != "chat_template_kwargs" and one.value is not None
        }


def propose(model: ModelDescription, machine: Machine, given: Mapping[str, Any]) -> Proposal:
    """Propose how to run a model on this machine.

    `given`: engine arguments that somebody chose; they replace those proposed.
    """
    warnings: list[str] = []
    values = [
        _context(model, machine, given, warnings),
        _dtype(model, machine),
        *_chat(model, warnings),
    ]
    kept = [
        Value(one.field, given[one.field], _GIVEN) if one.field in given else one for one in values
    ]
    known = {one.field for one in kept}
    kept += [Value(name, value, _GIVEN) for name, value in given.items() if name not in known]
    if model.is_gated:
        warnings.append(f"{model.place} is gated. {consent(model.place)}")
    return Proposal(tuple(kept), tuple(warnings), model.download_bytes)


def _context(
    model: ModelDescription, machine: Machine, given: Mapping[str, Any], warnings: list[str]
) -> Value:
    text = model.config.get("text_config")
    own = (text if isinstance(text, dict) else model.config).get("max_position_embeddings")
    own = own if isinstance(own, int) and own > 0 else None
    measured = size_of_config(model.config, model.weight_bytes)
    tokens = None if measured is None else cache_tokens(measured, machine, given)
    if measured is None or tokens is None:
        reason = "the model's own; the memory that it needs can't be estimated for this kind"
        return Value("max_model_len", own, reason)
    weights = f"{size(measured.weight_bytes)} of weights"
    total = size(machine.memory_bytes or 0)
    if tokens < FEWEST_TOKENS:
        warnings.append(
            f"{weights} and a cache don't fit in the {total} of {machine.device}: use a smaller or "
            "quantized model, or more GPUs (-e tensor_parallel_size=N)."
        )
        return Value("max_model_len", None, "the model does not fit this machine")
    if machine.device_type == "cpu":
        room = f"a cache of {size(cpu_cache_bytes())} (VLLM_CPU_KVCACHE_SPACE) has room for"
    else:
        room = f"{weights} leave room in {total} for"
    room += f" about {tokens:,} tokens"
    if own is not None and own <= tokens:
        return Value("max_model_len", own, f"the model's own context; {room}")
    fits = tokens // FEWEST_TOKENS * FEWEST_TOKENS
    beside = f", fewer than the {own:,} that the model knows" if own is not None else ""
    return Value("max_model_len", fits, f"{room}{beside}")


def _dtype(model: ModelDescription, machine: Machine) -> Value:
    if model.config.get("quantization_config"):
        return Value("dtype", None, "left to vLLM: the weights are quantized")
    text = model.config.get("text_config")
    places = [model.config, text if isinstance(text, dict) else {}]
    said = next((p.get(k) for p in places for k in ("dtype", "torch_dtype") if p.get(k)), None)
    if machine.device_type == "gpu" and any(name in machine.device for name in _WITHOUT_BFLOAT16):
        return Value("dtype", "float16", f"{machine.device} can't compute with bfloat16")
    if said in ("bfloat16", "float16"):
        return Value("dtype", said, "as in config.json")
    if said == "float32":
        return Value("dtype", "bfloat16", "vLLM's choice for weights in float32; half the memory")
    return Value("dtype", None, "left to vLLM: config.json names none")


def _chat(model: ModelDescription, warnings: list[str]) -> Iterator[Value]:
    if model.template is None:
        warnings.append(
            "The model has no chat template: only /v1/completions (or embeddings and scores) work, "
            "requests to /v1/chat/completions fail. For chat, take the instruction-tuned model, or "
            "add -e chat_template=FILE."
        )
        return
    tool = tool_parser(model.model_type, model.template) if model.has_tools else None
    if tool is not None:
        yield Value("tool_call_parser", tool.name, tool.reason)
    elif model.has_tools:
        yield Value("tool_call_parser", None, "none is known for it: tool calls stay text")
    else:
        yield Value("tool_call_parser", None, "its chat template has no tools")
    reasoning = model.reasoning_parser
    if reasoning is not None:
        yield Value("reasoning_parser", reasoning.name, reasoning.reason)
    elif model.thinks:
        yield Value("reasoning_parser", None, "none is known for it")
        warnings.append(
            "The model seems to reason, but no reasoning parser is known for it: its reasoning "
            "may end up in the answers."
        )
    else:
        yield Value("reasoning_parser", None, "its chat template shows no reasoning")
    if model.switch is not None:
        state = {True: "on", False: "off", None: "unknown"}[model.thinks_by_default]
        yield Value(
            "chat_template_kwargs",
            [model.switch],
            f"requests may turn reasoning on and off with it; without it: {state}",
        )
