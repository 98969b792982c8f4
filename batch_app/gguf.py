"""GGUF, the format of llama.cpp: vLLM 0.32 can't load it."""

from __future__ import annotations

from collections.abc import Sequence

FIX_GGUF = (
    "use the original repository, which has *.safetensors files; or convert the model to "
    "safetensors (transformers: from_pretrained(FOLDER, gguf_file=FILE), then save_pretrained); "
    'or run it in llama.cpp\'s server with engine = "openai"'
)
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt")


def gguf_problem(place: str, file_names: Sequence[str]) -> str | None:
    """Return why a model can't be loaded if its only weights are GGUF files; else None.

    `place` is the folder, file or hub id, for the message.
    """
    found = [name for name in file_names if name.lower().endswith(".gguf")]
    if not found or any(name.endswith(_OTHER_WEIGHTS) for name in file_names):
        return None
    which = f"GGUF file {found[0]}" if len(found) == 1 else f"{len(found):,} GGUF files"
    return f"{place} has no weights but the {which}, which vLLM can't load"
