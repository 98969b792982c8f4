#!/usr/bin/env bash
# Start the API server. Options are handed on: ./start_api_server.sh --port 8080
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

echo "=================================="
echo "Starting Batch API Server"
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

exec "$python" -m batch_app.api_server "$@"
