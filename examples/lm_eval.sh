#!/usr/bin/env bash
# Run a generation task of lm-evaluation-harness, here a local one, on `illada serve`, as on any server with OpenAI's API.
#
#     illada serve --model runs/demo/model
#     examples/lm_eval.sh OUTPUT [http://127.0.0.1:8000]
#
# A key of the server, if it has any, is read from OPENAI_API_KEY. Tasks that need likelihoods, and the paper's scoring,
# are for `illada eval`: there is no API for them. Needs pip install 'lm-eval[api]'.
set -euo pipefail
output=$(realpath "${1:?say where the results go}")
url=${2:-http://127.0.0.1:8000}
export HF_HUB_OFFLINE=1
model=$(curl --silent --show-error --fail --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" "$url/v1/models" |
  sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')

cd "$(dirname "$0")/lm_eval" # the task's data lie beside it
lm_eval run --model local-chat-completions \
  --model_args "base_url=$url/v1/chat/completions,model=$model,tokenizer_backend=None,num_concurrent=4" \
  --include_path . --tasks reversal --apply_chat_template --output_path "$output" --log_samples
