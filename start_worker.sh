#!/usr/bin/env bash
# Start the worker. Options are handed on to batch_app.worker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

echo "=================================="
echo "Starting Batch Worker"
echo "=================================="

if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
elif [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
    python="$VIRTUAL_ENV/bin/python"
elif [[ -x venv/bin/python ]]; then
    python=venv/bin/python
else
    echo "No Python environment found here. Make one first: make setup" >&2
    exit 1
fi

exec "$python" -m batch_app.worker "$@"
