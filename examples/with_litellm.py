"""LiteLLM: an OpenAI-compatible provider at this server's address."""

import json
import os
import time
from pathlib import Path

# Prices are no matter here; without this, the import asks the internet for them.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm

SERVER = os.environ.get("VLLM_BATCH_SERVER", "http://localhost:8080")
MODEL = os.environ.get("MODEL", "demo")
HERE = {
    "custom_llm_provider": "openai",
    "api_base": f"{SERVER}/v1",
    "api_key": os.environ.get("VLLM_BATCH_API_KEY", "none"),
}

lines = []
for line in Path(__file__).with_name("questions.jsonl").read_bytes().splitlines():
    request = json.loads(line)
    request |= {"method": "POST", "url": "/v1/chat/completions"}
    request["body"]["model"] = MODEL
    lines.append(json.dumps(request))

content = ("questions.jsonl", "\n".join(lines).encode())
file = litellm.create_file(file=content, purpose="batch", **HERE)
batch = litellm.create_batch(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **HERE
)
while batch.status not in ("completed", "failed", "cancelled", "expired"):
    time.sleep(0.5)
    batch = litellm.retrieve_batch(batch_id=batch.id, **HERE)
if batch.status != "completed":
    raise SystemExit(f"The batch is {batch.status}: {batch.errors}")

for line in litellm.file_content(file_id=batch.output_file_id, **HERE).content.splitlines():
    result = json.loads(line)
    answer = result["response"]["body"]["choices"][0]["message"]["content"]
    print(f"{result['custom_id']}: {answer}")
