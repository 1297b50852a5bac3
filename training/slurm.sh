#!/bin/bash
# One distillation over several nodes of a Slurm cluster, one torchrun a node. Submitted again under the same name, or
# requeued after a node failed, it goes on from the last checkpoint.
#   sbatch --nodes 2 --gpus-per-node 8 --job-name sdxl training/slurm.sh sdxl nodes task.prompts=prompts.txt
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
set -euo pipefail
out="runs/$SLURM_JOB_NAME"
resume=()
if [ -e "$out/checkpoint.pt" ]; then resume=(--resume); fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m tdm.cli distill "$@" --out "$out" "${resume[@]}"
