"""The project's own client: submit a file, watch it, and go through the results."""

import os
import sys
from pathlib import Path

from batch_app.client import BatchClient
from batch_app.errors import BadLines

SERVER = os.environ.get("VLLM_BATCH_SERVER", "http://localhost:8080")
MODEL = os.environ.get("MODEL", "demo")
QUESTIONS = Path(__file__).with_name("questions.jsonl")

with BatchClient(SERVER, api_key=os.environ.get("VLLM_BATCH_API_KEY")) as client:
    try:
        batch = client.submit(QUESTIONS, model=MODEL)
    except BadLines as refusal:
        for bad in refusal.errors:
            print(f"line {bad.line}: {bad.message}", file=sys.stderr)
        raise SystemExit("Nothing was queued.") from None

    batch = client.wait(
        batch,
        on_progress=lambda seen: print(
            f"{seen.status}: {seen.progress.done} of {seen.progress.total}", file=sys.stderr
        ),
    )
    for result in client.results(batch, with_requests=True):
        if result.error:
            print(f"{result.custom_id} failed: {result.error.message}")
        else:
            question = result.request["body"]["messages"][-1]["content"]
            print(f"{result.custom_id}: {question} → {result.text}")
