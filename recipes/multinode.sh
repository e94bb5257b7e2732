#!/usr/bin/env bash
# One run on several machines without a scheduler: start this on each of them, with the same arguments.
#   NODES=4 HEAD=node0:29500 recipes/multinode.sh pretrain recipes/8b-pretrain.yaml --data.train DATA --output RUN
# DATA and RUN lie on a disk that all machines see. NODES: how many machines. HEAD: name or address of one of them and a
# free port. GPUS: processes on each, by default one for each GPU. A machine that fails ends the run on all; start it again
# on as many machines as are left, and it continues from the newest checkpoint.
set -euo pipefail
: "${NODES:?how many machines, e.g. NODES=4}" "${HEAD:?one machine and a free port, e.g. HEAD=node0:29500}"
exec torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-gpu}" \
  --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${ID:-illada}" \
  --shutdown-timeout 600 -m illada "$@"
