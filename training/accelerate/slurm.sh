#!/usr/bin/env bash
# Joint training on 8 nodes of 8 GPUs under SLURM:
#     sbatch training/accelerate/slurm.sh CONFIG.yaml loop.output_dir=RUN [section.key=value ...]
# One task a GPU, without a launcher between SLURM and Python, so that SLURM's signals reach the training processes:
# five minutes before the time limit, SIGUSR1 makes them save a checkpoint and end; the job is then queued again.
#SBATCH --job-name=ldlm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=runs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

config=$1
shift
output_dir=
for override in "$@"; do
    case $override in loop.output_dir=*) output_dir=${override#*=} ;; esac
done
[ -n "$output_dir" ] || { echo "name the run's folder: loop.output_dir=RUN" >&2; exit 2; }
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# a job that was queued again goes on from its newest checkpoint, and the first one starts the run. One that died after
# its first steps and before its first checkpoint is an error: give --overwrite_output_dir, too, to start anew then
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python training/train_joint.py --resume_from_checkpoint latest --config "$@"
' srun "$config" "$@"

# the run's last act is its model card
[ -e "$output_dir/pipeline/README.md" ] || scontrol requeue "$SLURM_JOB_ID"
