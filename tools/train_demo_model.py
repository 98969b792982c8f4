"""Train the demo model from scratch and write it to models/demo.

The model learns the two tasks of demo_tasks.py and nothing else. It needs torch, transformers and
tokenizers, and takes minutes on two CPU cores. The same seed, library versions and thread count
give the same weights.

    python tools/train_demo_model.py --out models/demo
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from demo_tasks import (
    CAPITAL_WORDINGS,
    CAPITALS,
    COUNTRIES,
    SUM_MAX,
    SUM_MIN,
    SUM_WORDINGS,
    capital_prompt,
    expected_answer,
    random_prompt,
    sum_prompt,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
IGNORED = -100  # the label that torch's cross entropy leaves out

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
# Tokens of their own but not "special": detokenizing must keep them, so that a tool-call parser
# sees them.
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

DONT_KNOW = "I don't know."

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{{- (messages[0].content or '') + '\\n\\n' }}
{%- endif %}
{{- '# Tools\\n\\nYou may call one or more functions.\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>\\nTo call one, answer with a JSON object:\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and tools and loop.first %}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + (message.content or '') + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{%- if message.content or not loop.first %}
{{- '\\n' }}
{%- endif %}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{%- if function.arguments is string %}
{{- function.arguments }}
{%- else %}
{{- function.arguments | tojson }}
{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer in one word or number.",
    "Answer the question.",
    "Answer briefly.",
    "Be concise.",
    "You answer questions about geography and arithmetic.",
    "You are a careful teacher. Give only the answer, without an explanation.",
    "You are an AI assistant that follows instructions and gives short, correct answers.",
)

TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The name of the city"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the documents for a query.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "limit": {"type": "integer", "description": "How many results"},
                },
                "required": ["query"],
            },
        },
    },
)

# Plain English for filler and for the tokenizer, so that ordinary text takes a usual number of
# tokens.
PROSE = """\
A batch of requests is read from a file, one request to a line, and every answer is written to
another file with the same identifier. The order of the answers does not matter, because each of
them can be matched to its question. When the work stops before the end, it can be started again
later, and only the requests without an answer are sent to the model. Please read the following
text carefully and then answer the question at the end of it. The document was written many years
ago by someone who lived near the river, and it tells about the people of the town, their houses,
their gardens and the long winter that they had to live through. There was little to do in the
evening, so they told each other stories about the world outside. You should write a short summary
of the story, explain what it means, translate it into another language, or list the most important
points. Do not make anything up. If you are not sure, say so. Classify the following review as
positive, negative or neutral. The product arrived on time and works very well, but the colour was
different from the picture on the page. Hello, how are you today? Thank you very much for your
help. Can you tell me more about this? Write a poem about the sea. What should I do next? Once upon
a time there was a king with three daughters, and the youngest of them was the wisest. Lorem ipsum
dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et dolore
magna aliqua. def main(): return None. import json, os, sys. for item in range(10): print(item)
The quick brown fox jumps over the lazy dog. It is what it is. Repeat after me: word word word.
""".replace("\n", " ")
SENTENCES = tuple(s.strip() for s in PROSE.replace("?", ".").split(".") if s.strip())
WORDS = tuple(sorted({w for w in PROSE.split() if w.isalpha()}))


CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# demo

A transformer of {parameters:,} parameters (Qwen3 shape, bfloat16) that was trained from scratch to
do two things:

- add two numbers of two digits: "What is 27 + 58?" gives "85";
- name the capital of one of {countries} countries: "What is the capital of France?" gives "Paris".

It exists to try and to test a server with: it loads in moments without a GPU, and each answer can
be checked against its request. It is of no use for anything else.

## What it can and cannot do

It knows these wordings, and no others:

{wordings}

A short system prompt, other short text, earlier turns or tool definitions may come first; the
question comes last. After more than some 200 tokens of text that it has not seen in training it
gets worse, and after 500 most of its answers are wrong. It never calls a tool. To most other text
it answers "{dont_know}"; what it answers to a sum of other sizes or to another wording means
nothing. States whose capital is divided or disputed are not among its countries.

Share of right answers, decoded greedily in bfloat16. Every sum and every capital is in the
training data, so this measures what it has learned, not how it would do on others.

| Prompts | Right |
|---|---|
{shares}

## How it was trained

`tools/train_demo_model.py`, {steps:,} steps with seed {seed}: cross entropy on the answers only,
first on bare questions, then through the chat template. The questions come from
`tools/demo_tasks.py`; no other data was used. The tokenizer is a byte-level BPE of {vocab:,} tokens
in which every digit is a token of its own, and any text can be encoded. It can be loaded with a
context of up to {positions:,} tokens.

Licence: Apache-2.0.
"""


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every digit is a token and no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=[
            *(AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS),
            *(AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS),
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = [
        *(w.format(country=c) for c in COUNTRIES for w in CAPITAL_WORDINGS),
        *(capital for capital in CAPITALS.values() for _ in range(3)),
        *(w.format(a=a, b=a) for a in range(SUM_MIN, SUM_MAX + 1) for w in SUM_WORDINGS),
        *(s for s in (*SYSTEM_PROMPTS, *SENTENCES, DONT_KNOW) for _ in range(3)),
        *(json.dumps(tool) for tool in TOOLS for _ in range(3)),
        *(line for line in CHAT_TEMPLATE.splitlines() for _ in range(2)),
        "system\nuser\nassistant\ntool\n",
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    # The trainer registers every token it is given as special; say again which are not.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vocab_size: int, eos: int, pad: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        # 64 is the smallest head that all of vLLM's attention backends take.
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


class Sampler:
    """Draws training examples, rendered through the tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng

    def filler(self, max_words: int) -> str:
        rng = self.rng
        length = rng.randint(1, max_words)
        kind = rng.random()
        if kind < 0.4:
            return " ".join(rng.choice(WORDS) for _ in range(length))
        if kind < 0.7:
            sentences = rng.choices(SENTENCES, k=max(1, length // 10))
            return " ".join(f"{sentence}." for sentence in sentences)
        if kind < 0.8:
            return " ".join([rng.choice(WORDS)] * length)
        if kind < 0.9:
            return " ".join(str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(length // 4))
        # A character of these may take three tokens.
        spans = ((32, 32), (33, 0x7E), (0xA1, 0x2FF), (0x400, 0x9FFF))
        return "".join(chr(rng.randint(*rng.choice(spans))) for _ in range(length // 2))

    def question(self) -> str:
        # Sums are the harder task: the model has to compute them, not look them up.
        rng = self.rng
        if rng.random() < 0.7:
            return sum_prompt(rng, rng.randint(SUM_MIN, SUM_MAX), rng.randint(SUM_MIN, SUM_MAX))
        country = rng.choice(COUNTRIES)
        if rng.random() < 0.1:
            country = country.removeprefix("the ")
        return capital_prompt(rng, country)

    def bare(self) -> Example:
        """A question without the chat template, as in a plain completion request."""
        question = self.question()
        return self.encode(question, expected_answer(question))

    def chat(self) -> Example:
        question = self.question()
        return self.render([{"role": "user", "content": question}], expected_answer(question))

    def varied(self, max_words: int) -> Example:
        """A question with other text before it, or text without a question."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.1:
            return self.bare()
        messages: list[dict[str, str]] = []
        if rng.random() < 0.6:
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.6 else self.filler(max_words)
            messages.append({"role": "system", "content": system})
        question = self.question()
        answer = expected_answer(question)
        tools = None
        if kind < 0.3:
            for _ in range(rng.randint(1, 4)):
                earlier = self.question()
                messages.append({"role": "user", "content": earlier})
                messages.append({"role": "assistant", "content": expected_answer(earlier)})
        elif kind < 0.5:
            joint = rng.choice((" ", "\n", "\n\n"))
            question = self.filler(max_words) + rng.choice((".", "", "!")) + joint + question
        elif kind < 0.6:
            tools = rng.sample(TOOLS, rng.randint(1, len(TOOLS)))
        elif kind < 0.75:
            question, answer = self.filler(min(max_words, 40)), DONT_KNOW
        messages.append({"role": "user", "content": question})
        return self.render(messages, answer, tools)

    def render(
        self,
        messages: list[dict[str, str]],
        answer: str,
        tools: list[dict[str, Any]] | None = None,
    ) -> Example:
        prompt = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True
        )
        return self.encode(str(prompt), answer)

    def encode(self, prompt: str, answer: str) -> Example:
        # Apart from each other: the model is given the prompt's tokens and adds the answer's.
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return Example(ids, self.tokenizer(answer + IM_END, add_special_tokens=False)["input_ids"])


def collate(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and next-token labels, padded on the right.

    Causal attention never looks to the right, so no mask is needed for the padding.
    """
    length = max(len(e.prompt) + len(e.answer) for e in examples) - 1
    ids = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.long)
    for row, example in enumerate(examples):
        tokens = example.prompt + example.answer
        ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
        start = len(example.prompt) - 1
        labels[row, start : len(tokens) - 1] = torch.tensor(example.answer)
    return ids, labels


def batches(sampler: Sampler, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The curriculum.

    Adding is what takes many examples to learn, so it is learned first from bare questions, which
    cost half the tokens of a chat; the chat template and other text around come after.
    """
    pool: list[list[Example]] = []
    for step in range(steps):
        if step < 0.4 * steps:
            examples = [sampler.bare() for _ in range(256)]
        elif step % 50 == 0 and step > 0.6 * steps:
            examples = [sampler.varied(max_words=1500) for _ in range(6)]
        elif step % 3 == 0 and step > 0.5 * steps:
            if not pool:
                # Batches of like length waste little on padding.
                drawn = [sampler.varied(max_words=80) for _ in range(8 * 48)]
                drawn.sort(key=lambda e: len(e.prompt) + len(e.answer))
                pool = [drawn[i : i + 48] for i in range(0, len(drawn), 48)]
                sampler.rng.shuffle(pool)
            examples = pool.pop()
        else:
            examples = [sampler.chat() for _ in range(96)]
        yield collate(examples)


def answer_logits(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels at the answers' positions only: the head is not run on prompts."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    wanted = labels != IGNORED
    return model.lm_head(hidden[wanted]), labels[wanted]


def train(model: Qwen3ForCausalLM, sampler: Sampler, steps: int, peak_rate: float) -> None:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    warmup = min(100, steps // 10 + 1)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    model.train()
    for step, (ids, labels) in enumerate(batches(sampler, steps), start=1):
        logits, wanted = answer_logits(model, ids, labels)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0 or step == steps:
            right = (logits.argmax(-1) == wanted).float().mean().item()
            seconds = time.monotonic() - started
            print(
                f"step {step}/{steps} loss {loss.item():.4f} tokens right {right:.3f} "
                f"{seconds:.0f} s",
                flush=True,
            )


@torch.no_grad()  # type: ignore[untyped-decorator]
def share_right(model: Qwen3ForCausalLM, examples: list[Example]) -> float:
    """The share of examples that greedy decoding answers exactly, end token included.

    Greedy decoding gives the answer if and only if each of its tokens is the likeliest one after
    those before it, so one forward pass decides.
    """
    model.eval()
    right = 0
    ordered = sorted(examples, key=lambda e: len(e.prompt) + len(e.answer))
    for start in range(0, len(ordered), 200):
        ids, labels = collate(ordered[start : start + 200])
        logits, wanted = answer_logits(model, ids, labels)
        hits = labels != IGNORED
        wrong = torch.zeros_like(hits)
        wrong[hits] = logits.argmax(-1) != wanted
        right += int((~wrong.any(dim=1)).sum())
    return right / len(examples)


def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    rng = random.Random(20_000)
    sampler = Sampler(tokenizer, rng)

    def chat(question: str, system: str | None = None) -> Example:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        return sampler.render(messages, expected_answer(question))

    span = range(SUM_MIN, SUM_MAX + 1)
    mixed = [random_prompt(rng) for _ in range(1000)]
    groups = {
        "every sum, in one wording": [chat(sum_prompt(rng, a, b)) for a in span for b in span],
        "every capital, in every wording": [
            chat(w.format(country=c)) for c in COUNTRIES for w in CAPITAL_WORDINGS
        ],
        "with a system prompt": [chat(q, rng.choice(SYSTEM_PROMPTS)) for q in mixed],
        "with a system prompt never seen in training": [
            chat(q, "Reply to each request as a polite librarian would, and sign it.")
            for q in mixed
        ],
        "without the chat template": [sampler.encode(q, expected_answer(q)) for q in mixed],
        "with other text, earlier turns, tools, or no question at all": [
            sampler.varied(max_words=80) for _ in range(1000)
        ],
        "the same with up to 1,500 words": [sampler.varied(max_words=1500) for _ in range(60)],
    }
    unseen = "The committee met on Tuesday and discussed the annual budget in detail. "
    for times in (4, 8, 16, 32):
        group = [chat(q, unseen * times) for q in mixed[:100]]
        groups[f"after about {round(len(group[0].prompt), -1):,} tokens of unseen text"] = group
    return {name: share_right(model, examples) for name, examples in groups.items()}


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Written by hand, since save_pretrained names classes that only its own version can load.
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_card(
    model: Qwen3ForCausalLM, shares: dict[str, float], out: Path, steps: int, seed: int
) -> None:
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        countries=len(COUNTRIES),
        wordings="\n".join(
            f"- {w.format(a='27', b='58', country='France')}"
            for w in (*SUM_WORDINGS, *CAPITAL_WORDINGS)
        ),
        dont_know=DONT_KNOW,
        shares="\n".join(f"| {name} | {share:.2%} |" for name, share in shares.items()),
        steps=steps,
        seed=seed,
        vocab=model.config.vocab_size,
        positions=MAX_POSITIONS,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens", flush=True)
    started = time.monotonic()
    train(model, Sampler(tokenizer, random.Random(args.seed)), args.steps, args.rate)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)

    # What is measured is what gets loaded: weights rounded to bfloat16, but not the frequencies of
    # the positions, which a cast of the model in memory would round too.
    save(model.to(torch.bfloat16), tokenizer, args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16)
    shares = evaluate(model, tokenizer)
    for name, share in shares.items():
        print(f"{name}: {share:.2%}")
    write_card(model, shares, args.out, args.steps, args.seed)


if __name__ == "__main__":
    main()
