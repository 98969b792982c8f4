"""`LLM.chat` on the whole list: what a person would write in a script.

    python -m benchmarks.peer.llm_chat INPUT OUTPUT ARGUMENTS.json

Writes the answers in the form of a batch's output, and prints `TIMES {"chat_s": …}`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(source: Path, output: Path, arguments: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    with source.open() as file:
        lines = [json.loads(line) for line in file]
    llm = LLM(**arguments)
    messages = [line["body"]["messages"] for line in lines]
    params = [
        SamplingParams(
            temperature=line["body"]["temperature"],
            max_tokens=line["body"]["max_tokens"],
            ignore_eos=line["body"]["ignore_eos"],
        )
        for line in lines
    ]
    started = time.perf_counter()
    answers = llm.chat(messages, params, use_tqdm=False)
    chat_s = time.perf_counter() - started
    with output.open("w") as file:
        for line, answer in zip(lines, answers, strict=True):
            file.write(json.dumps(_line(line["custom_id"], answer)) + "\n")
    sys.stdout.write(f"TIMES {json.dumps({'chat_s': chat_s})}\n")


def _line(custom_id: str, answer: Any) -> dict[str, Any]:
    said = answer.outputs[0]
    usage = {
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": len(said.token_ids),
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens or 0},
    }
    message = {"role": "assistant", "content": said.text}
    body = {"choices": [{"message": message}], "usage": usage}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
