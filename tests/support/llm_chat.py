"""The requests of a file through vLLM's `LLM.chat`: `python llm_chat.py INPUT OUTPUT MODEL LENGTH`.

Writes one line for each request: its text, finish reason and counts of tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(source: Path, output: Path, model: str, max_model_len: int) -> None:
    from vllm import LLM
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    lines = [json.loads(line) for line in source.read_text().splitlines()]
    llm = LLM(model, max_model_len=max_model_len, enforce_eager=True, dtype="float32")
    answers: dict[str, Any] = {}
    with_tools = [line for line in lines if "tools" in line["body"]]
    others = [line for line in lines if "tools" not in line["body"]]
    # One call has one list of tools. As `vllm serve`, which leaves tools that mustn't be used out.
    for group in (others, with_tools):
        bodies = [line["body"] for line in group]
        params = [
            ChatCompletionRequest(**body).to_sampling_params(body["max_tokens"], {})
            for body in bodies
        ]
        outputs = llm.chat([body["messages"] for body in bodies], params, use_tqdm=False)
        for line, answer in zip(group, outputs, strict=True):
            said = answer.outputs[0]
            answers[line["custom_id"]] = {
                "text": said.text,
                "finish_reason": said.finish_reason,
                "prompt_tokens": len(answer.prompt_token_ids),
                "completion_tokens": len(said.token_ids),
            }
    output.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
