#!/usr/bin/env bash
# One run on several nodes without Slurm. The same on each node, with the address of one of them:
#   NODES=2 GPUS=4 HEAD=10.0.0.1 scripts/torchrun.sh trainer=ddp experiment=…
# The nodes need the same clone and packages, and log_dir on a disk that all of them see. A process that fails ends all;
# torchrun starts them again up to three times, and they go on from the newest checkpoint.
set -euo pipefail
exec .venv/bin/torchrun --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" --rdzv-id="${RUN_ID:-boltlab}" \
  -m boltlab train "$@"
