#!/usr/bin/env bash
# curl: submit, follow the log until the batch has ended, download.
set -euo pipefail

server=${VLLM_BATCH_SERVER:-http://localhost:8080}
model=${MODEL:-demo}
here=$(dirname "$0")
key=(${VLLM_BATCH_API_KEY:+-H "Authorization: Bearer $VLLM_BATCH_API_KEY"})

submitted=$(curl -sS --fail-with-body "${key[@]}" "$server/v1/batches" \
    -F "file=@$here/questions.jsonl" -F "model=$model") || { echo "$submitted" >&2; exit 1; }
batch=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["batch_id"])' <<<"$submitted")

curl -sS --fail-with-body "${key[@]}" "$server/v1/batches/$batch/logs?follow=true" >&2
curl -sS --fail-with-body "${key[@]}" "$server/v1/batches/$batch/results"
