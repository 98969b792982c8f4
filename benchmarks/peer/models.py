"""Models made on the spot, so that a benchmark needs no model hub.

`tiny`: random weights, a Qwen3 of 4 layers and hidden size 128. The others have no weights, for
`--load-format dummy`: `gemma` is the shape of Gemma 3 4B, `qwen3-0.6b` that of Qwen3 0.6B, and
`gemma-small` and `qwen3-small` are these with few and narrow layers, for a CPU. Each has a
byte-level BPE tokenizer in which every word of `text.WORDS` is one token.

    python -m benchmarks.peer.models tiny FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.peer.text import WORDS

SEED = 20251123
VOCAB_SIZE = 4096
#: Rises when what is made here changes, so that no older one is taken for it.
VERSION = 1

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 32768,
    "vocab_size": 262208,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

QWEN3_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "rope_theta": 1_000_000,  # where transformers is older than the line above
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
}
#: Models without weights, by kind.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma": GEMMA_CONFIG,
    "gemma-small": {**GEMMA_CONFIG, **_SMALL, "vocab_size": 16384},
    "qwen3-0.6b": QWEN3_CONFIG,
    "qwen3-small": {**QWEN3_CONFIG, **_SMALL},
}


def ready(kind: str, folder: Path) -> Path:
    """The folder of this model; made there, in a process of its own, unless it is there already."""
    target = folder / f"{kind}-v{VERSION}"
    if not (target / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.peer.models", kind, str(target)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=os.environ | quiet)
    return target


def make(kind: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if kind == "tiny":
        _write_tokenizer(target, VOCAB_SIZE)
        _write_tiny(target)
    else:
        config = SHAPES[kind]
        _write_tokenizer(target, config["vocab_size"])
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tiny(target: Path) -> None:
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        # Wide, so that the best next token stands clear of the next best: answers can be compared.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(target)


def _write_tokenizer(target: Path, vocab_size: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in (END_OF_TEXT, IM_START, IM_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # Twice each, with and without the space before it.
    corpus = [word for word in WORDS for _ in range(2)]
    corpus += [" ".join(["x", *WORDS])] * 4 + ["system user assistant \n"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        # A model may choose any of its tokens, so each has to have a text.
        state = json.loads(tokenizer.to_str())
        vocab = state["model"]["vocab"]
        for number in range(len(vocab), vocab_size):
            vocab[f"<unused{number}>"] = number
        tokenizer = Tokenizer.from_str(json.dumps(state))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=16384,
    ).save_pretrained(target)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
