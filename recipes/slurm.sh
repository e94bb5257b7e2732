#!/usr/bin/env bash
# One run on several machines under Slurm; stopped or preempted, it is queued again and continues.
#   sbatch --nodes 4 recipes/slurm.sh pretrain recipes/8b-pretrain.yaml --data.train DATA --output RUN
# DATA and RUN lie on a disk that all machines see. Ten minutes before its time is over the run saves a checkpoint and stops.
#SBATCH --job-name=illada
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
stopped=0
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node gpu \
  --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  --shutdown-timeout 600 -m illada "$@" &
run=$!
# srun passes the signal on to torchrun and that to the run, which saves.
trap 'stopped=1; kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
if [ "$stopped" -eq 1 ]; then
  wait "$run" || true  # the first one was cut short by the signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
