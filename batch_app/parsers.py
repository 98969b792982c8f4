"""The tool-call and reasoning parsers that fit a model, by vLLM's own names.

A table, because neither a model's files nor vLLM say which parser a model needs. Sources: vLLM's
documentation of tool calling and of reasoning outputs, and the model cards. A contract test checks
that the installed vLLM has every name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """The parsers of a family of models. The first rule that fits counts.

    `model_types`: as in config.json; empty: any. `marker`: text that the chat template must have.
    """

    model_types: tuple[str, ...]
    marker: str = ""
    tool: str | None = None
    reasoning: str | None = None

    def fits(self, model_type: str, template: str) -> bool:
        return (not self.model_types or model_type in self.model_types) and self.marker in template


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser's name, and why it was chosen."""

    name: str
    reason: str


_QWEN3 = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe")
_QWEN3_NEXT = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
_DEEPSEEK = ("deepseek_v3",)
_GLM = ("glm4_moe", "glm4v_moe")
_MISTRAL = ("mistral", "mistral3", "ministral", "ministral3", "mixtral", "pixtral")

RULES: tuple[Rule, ...] = (
    Rule((*_QWEN3, *_QWEN3_NEXT), "<function=", tool="qwen3_coder", reasoning="qwen3"),
    Rule((*_QWEN3, *_QWEN3_NEXT), tool="hermes", reasoning="qwen3"),
    Rule(("deepseek_v4",), tool="deepseek_v4", reasoning="deepseek_v4"),
    Rule(("deepseek_v32",), tool="deepseek_v32", reasoning="deepseek_v3"),
    # V3.1 switches thinking; R1 always thinks; V3 never does.
    Rule(_DEEPSEEK, "thinking", tool="deepseek_v31", reasoning="deepseek_v3"),
    Rule(_DEEPSEEK, tool="deepseek_v3", reasoning="deepseek_r1"),
    Rule(("gpt_oss",), tool="openai", reasoning="openai_gptoss"),
    Rule(("gemma4", "gemma4_text", "gemma4_unified"), tool="gemma4", reasoning="gemma4"),
    Rule(_GLM, tool="glm45", reasoning="glm45"),
    Rule(("glm4_moe_lite", "glm_moe_dsa"), tool="glm47", reasoning="glm47"),
    Rule(("minimax_m2",), tool="minimax_m2", reasoning="minimax_m2"),
    Rule(("kimi_k2",), tool="kimi_k2", reasoning="kimi_k2"),
    Rule(("seed_oss",), tool="seed_oss", reasoning="seed_oss"),
    Rule(("ernie4_5", "ernie4_5_moe"), tool="ernie45", reasoning="ernie45"),
    Rule(("hunyuan_v1_moe",), tool="hunyuan_a13b", reasoning="hunyuan_a13b"),
    Rule(("olmo3",), tool="olmo3", reasoning="olmo3"),
    Rule(("nemotron_h",), "<function=", tool="qwen3_coder", reasoning="nemotron_v3"),
    Rule(("mimo", "mimo_v2_flash"), tool="mimo", reasoning="mimo"),
    Rule(("step3", "step3_vl", "step3_text"), tool="step3", reasoning="step3"),
    Rule(("step3p5",), tool="step3p5", reasoning="step3p5"),
    Rule(("granite", "granitemoe"), "thinking", tool="granite", reasoning="granite"),
    Rule(("granitemoehybrid",), tool="granite4"),
    Rule(("granite", "granitemoe"), "<tool_call>", tool="granite4"),
    Rule(("granite", "granitemoe"), tool="granite"),
    Rule(_MISTRAL, "[THINK]", tool="mistral", reasoning="mistral"),
    Rule(_MISTRAL, "[TOOL_CALLS]", tool="mistral"),
    Rule(("llama4", "llama4_text"), tool="llama4_pythonic"),
    Rule(("llama", "mllama"), "<|python_tag|>", tool="llama3_json"),
    Rule(("llama", "mllama"), "ipython", tool="llama3_json"),
    Rule(("phi3", "phi4mm"), "<|tool|>", tool="phi4_mini_json"),
    Rule(("lfm2", "lfm2_moe"), tool="lfm2"),
    Rule(("jamba",), tool="jamba"),
    Rule(("internlm2", "internlm3"), tool="internlm"),
    Rule(("apertus",), tool="apertus"),
    # Fine-tuned models of any family keep to what their template writes.
    Rule((), "<tool_call>", tool="hermes"),
)
#: How a template shows that the model reasons, and the parser for families that aren't listed.
_THINK_TAG = "<think>"
ALWAYS_THINKS, MAY_THINK = "deepseek_r1", "qwen3"


def tool_parser(model_type: str, template: str) -> Parser | None:
    """Choose the tool-call parser of a model with tools; None if the family isn't known."""
    fitting = _fitting(model_type, template)
    return next((Parser(rule.tool, why) for rule, why in fitting if rule.tool), None)


def reasoning_parser(
    model_type: str, template: str, *, thinks: bool, switch: bool
) -> Parser | None:
    """Choose the reasoning parser; None if nothing shows that the model reasons.

    `thinks`: the template has the model reason, or knows text that reasoning leaves. `switch`: it
    has an argument that turns reasoning on and off.
    """
    if not thinks:
        return None
    fitting = _fitting(model_type, template)
    found = next((Parser(rule.reasoning, why) for rule, why in fitting if rule.reasoning), None)
    if found is not None or _THINK_TAG not in template:
        return found
    name = MAY_THINK if switch else ALWAYS_THINKS
    return Parser(name, f"its chat template has {_THINK_TAG}")


def _fitting(model_type: str, template: str) -> Iterator[tuple[Rule, str]]:
    for rule in RULES:
        if rule.fits(model_type, template):
            if rule.model_types:
                why = f"model type {model_type}"
                why += f", and its chat template has {rule.marker}" if rule.marker else ""
            else:
                why = f"its chat template has {rule.marker}"
            yield rule, why
