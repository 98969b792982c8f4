"""150 requests of many kinds for a real chat model, the same each time; all at temperature 0."""

from __future__ import annotations

import random
from typing import Any

MODEL_LEN = 4096

_QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "Name three animals that live in the sea.",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about autumn.",
    "How many days does a leap year have?",
    "Give a synonym of 'quick'.",
    "What is photosynthesis?",
    "List the first five prime numbers.",
)
#: One for each of eight languages; their characters are of one to four bytes.
_LANGUAGES = (
    "Hello! How are you today?",
    "Wie heißt die größte Stadt Österreichs?",
    "Où se trouve la tour Eiffel, s'il vous plaît ?",
    "¿Cuál es el río más largo de España?",
    "Какая столица России?",
    "日本の首都はどこですか。",
    "中国最长的河流是哪一条？",
    "ما هي عاصمة مصر؟ 🐫",
)
_STOPS: tuple[list[str], ...] = (["."], [","], [" is"], ["the"], ["\n"])
_SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "enum": ["cat", "dog", "horse"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
_WORDS = ("river", "stone", "window", "garden", "music", "paper", "bridge", "winter", "market")


def mixed_requests(model: str) -> list[dict[str, Any]]:
    """Lines of a batch's input: 40 questions, 24 in eight languages, 20 that stop at a string that
    comes up, 16 bound to a JSON schema, 16 with log probabilities, 16 conversations, 10 with tools
    in the prompt, and 8 whose prompt nearly fills a context of `MODEL_LEN` tokens."""
    rng = random.Random(18)
    bodies: list[dict[str, Any]] = []

    def ask(text: str, max_tokens: int, **more: Any) -> None:
        bodies.append(
            {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **more}
        )

    for number in range(40):
        ask(_QUESTIONS[number % len(_QUESTIONS)], rng.choice((1, 8, 24, 48)), seed=number)
    for number in range(24):
        ask(_LANGUAGES[number % len(_LANGUAGES)], 12 + number)
    for number in range(20):
        ask(_QUESTIONS[number % len(_QUESTIONS)], 40, stop=_STOPS[number % len(_STOPS)])
    response_format = {
        "type": "json_schema",
        "json_schema": {"name": "animal", "schema": _SCHEMA, "strict": True},
    }
    for _ in range(16):
        ask(
            f"Describe an animal you might see near a {rng.choice(_WORDS)} as JSON.",
            40,
            response_format=response_format,
        )
    for number in range(16):
        ask(_QUESTIONS[-1 - number % 8], 12, logprobs=True, top_logprobs=1 + number % 3)
    for number in range(16):
        turns = [{"role": "system", "content": "Answer briefly."}]
        for turn in range(1 + number % 3):
            turns += [
                {"role": "user", "content": _QUESTIONS[(number + turn) % len(_QUESTIONS)]},
                {"role": "assistant", "content": rng.choice(_WORDS).title() + "."},
            ]
        turns.append({"role": "user", "content": "Are you sure? Say why."})
        bodies.append({"messages": turns, "max_tokens": 24})
    tool = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for number in range(10):
        city = ("Paris", "Oslo", "Lima")[number % 3]
        ask(f"Is it raining in {city} now?", 20, tools=[tool], tool_choice="none")
    for number in range(8):
        # Of this vocabulary each of these words with its space is one token.
        words = (rng.choice(_WORDS) for _ in range(MODEL_LEN - 64 - number * 100))
        ask(" ".join(words), 8)
    rng.shuffle(bodies)
    return [
        {
            "custom_id": f"real-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "temperature": 0, **body},
        }
        for number, body in enumerate(bodies)
    ]
