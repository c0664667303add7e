#!/bin/bash
# Two nodes of four GPUs, one process a node: sbatch experiments/cluster/jobs/slurm.sh
# --coordinator=auto reads the rest from SLURM. --resume makes a requeued job go on where it stopped.
#SBATCH --job-name=jaxrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue

set -euo pipefail
# Before the first start the folder holds nothing to resume; --resume then starts afresh.
srun python -m experiments.moe.launch --study=text_folding --preset=paper \
  --num_cpu_devices=-1 --coordinator=auto --resume --workdir="${WORKDIR:-runs/slurm-$SLURM_JOB_NAME}"
