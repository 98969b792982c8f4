"""OpenAI's SDK, unchanged but for the address: upload, create, wait, download."""

import json
import os
import time
from pathlib import Path

from openai import OpenAI

SERVER = os.environ.get("VLLM_BATCH_SERVER", "http://localhost:8080")
MODEL = os.environ.get("MODEL", "demo")

client = OpenAI(base_url=f"{SERVER}/v1", api_key=os.environ.get("VLLM_BATCH_API_KEY", "none"))

# In OpenAI's dialect each line names its model, method and URL.
lines = []
for line in Path(__file__).with_name("questions.jsonl").read_bytes().splitlines():
    request = json.loads(line)
    request |= {"method": "POST", "url": "/v1/chat/completions"}
    request["body"]["model"] = MODEL
    lines.append(json.dumps(request))

file = client.files.create(file=("questions.jsonl", "\n".join(lines).encode()), purpose="batch")
batch = client.batches.create(
    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
)
while batch.status not in ("completed", "failed", "cancelled", "expired"):
    time.sleep(0.5)
    batch = client.batches.retrieve(batch.id)
if batch.status != "completed":
    raise SystemExit(f"The batch is {batch.status}: {batch.errors}")

# What succeeded is in one file, what didn't in another; neither exists without lines.
if batch.output_file_id:
    for line in client.files.content(batch.output_file_id).iter_lines():
        result = json.loads(line)
        answer = result["response"]["body"]["choices"][0]["message"]["content"]
        print(f"{result['custom_id']}: {answer}")
if batch.error_file_id:
    for line in client.files.content(batch.error_file_id).iter_lines():
        print("failed:", line)
