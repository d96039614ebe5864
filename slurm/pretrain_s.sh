#!/bin/bash
# Trains configs/igpt_s.yaml: sbatch slurm/pretrain_s.sh --run RUN --data.shards SHARDS [options of python -m pipeline train]
# What stands before the script's name are sbatch's options; `slurm/pretrain_s.sh --dry-run` prints what it would submit.
#SBATCH --job-name=igpt-s
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
#SBATCH --signal=B:USR1@180
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
[ -e "$SCRIPTS/common.sh" ] || SCRIPTS=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\)\/[^ ]*.*/\1/p' | head -n 1)
# shellcheck source=lib/pretrain.sh
source "$SCRIPTS/lib/pretrain.sh"
pretrain igpt_s "$@"
