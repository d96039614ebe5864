#!/bin/bash
# Trains configs/igpt_m.yaml:
#   sbatch [options of sbatch] slurm/pretrain_m.sh [options of python -m pipeline train]
# RUNS and SHARDS in slurm/site.sh name the folders of runs and shard sets; --run RUN and --data.shards SHARDS name
# others.
# `slurm/pretrain_m.sh --dry-run` on the login node checks everything that can be checked there, and submits nothing.
#SBATCH --job-name=igpt-m
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
#SBATCH --signal=B:USR1@180
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
[ -e "$SCRIPTS/common.sh" ] || SCRIPTS=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\)\/[^ ]*.*/\1/p' | head -n 1)
# shellcheck source=lib/pretrain.sh
source "$SCRIPTS/lib/pretrain.sh"
pretrain igpt_m "$@"
