"""polars: a prompt a row, and the answers as a new column."""

import os
from pathlib import Path

import polars as pl

from batch_app.client import BatchClient

SERVER = os.environ.get("VLLM_BATCH_SERVER", "http://localhost:8080")
MODEL = os.environ.get("MODEL", "demo")

reviews = pl.read_csv(Path(__file__).with_name("reviews.csv"))

requests = (
    {
        "custom_id": str(row["id"]),
        "body": {
            "messages": [{"role": "user", "content": f"Summarise in five words: {row['text']}"}],
            "max_tokens": 32,
        },
    }
    for row in reviews.iter_rows(named=True)
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

columns = {"id": pl.Int64, "summary": pl.String, "error": pl.String}
answered = reviews.join(pl.DataFrame(results, schema=columns), on="id", how="left")
with pl.Config(tbl_cols=-1, fmt_str_lengths=200, tbl_width_chars=200):
    print(answered)
