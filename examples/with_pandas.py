"""pandas: a prompt a row, and the answers as a new column."""

import os
from pathlib import Path

import pandas as pd

from batch_app.client import BatchClient

SERVER = os.environ.get("VLLM_BATCH_SERVER", "http://localhost:8080")
MODEL = os.environ.get("MODEL", "demo")

reviews = pd.read_csv(Path(__file__).with_name("reviews.csv"), index_col="id")

requests = (
    {
        "custom_id": str(number),
        "body": {
            "messages": [{"role": "user", "content": f"Summarise in five words: {text}"}],
            "max_tokens": 32,
        },
    }
    for number, text in reviews["text"].items()
)
with BatchClient(SERVER, api_key=os.environ.get("VLLM_BATCH_API_KEY")) as client:
    batch = client.wait(client.submit(requests, model=MODEL))
    results = [
        {
            "id": int(result.custom_id),
            "summary": result.text,
            "error": result.error and result.error.message,
        }
        for result in client.results(batch)
    ]

answered = reviews.join(pd.DataFrame(results).set_index("id"))
print(answered.to_string())
