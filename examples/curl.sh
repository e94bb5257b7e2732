#!/usr/bin/env bash
# curl on `illada serve`: an answer, a stream, the steps of the denoising, gaps, an error.
#
#     illada serve --model runs/demo/model
#     examples/curl.sh [http://127.0.0.1:8000]
#
# A key of the server, if it has any, is read from OPENAI_API_KEY.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}

ask() { # PATH JSON
  curl --silent --show-error --no-buffer "$url/v1/$1" --data "$2" \
    --header "Content-Type: application/json" --header "Authorization: Bearer ${OPENAI_API_KEY:-none}"
  echo
}

question='"messages": [{"role": "user", "content": "Reverse: l o a d"}], "max_tokens": 16'
ask chat/completions "{$question}"
ask chat/completions "{$question, \"stream\": true}"
ask chat/completions "{$question, \"stream\": true, \"diffusion\": true, \"decoding\": {\"steps_per_block\": 2}}"
ask completions '{"prompt": "import ___ and ___", "slot_tokens": 3}'
ask completions '{"prompt": "one", "n": 2, "temperature": 0.8, "seed": 1, "max_tokens": 8, "logprobs": 1}'
ask completions '{"prompt": "one", "best_of": 3}' # is refused, and the message says why
