#!/bin/bash
# A shard set by an array of parts, each restartable; the set is joined by a job that waits for all of them:
#   sbatch --array=1-10 slurm/prepare_shards.sh --config configs/data/imagenet.yaml --source.path PICTURES \
#       --palette.file palette.npy --out SHARDS
# It needs no accelerator: after `source slurm/site.sh` with accelerators, give sbatch --gpus-per-node=0.
# A part has nothing to do beyond the set's units of 8,192 images (or tars).
#SBATCH --job-name=prepare-shards
#SBATCH --array=1-4
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.txt
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
[ -e "$SCRIPTS/common.sh" ] || SCRIPTS=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\)\/[^ ]*.*/\1/p' | head -n 1)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"

if take_test "$@"; then
  test_script "$SCRIPTS/prepare_shards.sh" "${ARGUMENTS[@]}"
  exit
fi
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] || die "this is an array job: submit it with sbatch --array=1-N, or add --test."
out=$(value_of --out "$@")
[ -n "$out" ] || die "--out is not given; name the folder of the shard set."
site_prepare
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
if [ "$part" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  printf -v join '%q ' env PYTHONPATH="$PYTHONPATH" "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep join "$out"
  submit_job "${SITE_CPU[@]}" --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
    --job-name=join-shards --ntasks=1 --output=%x-%j.txt --wrap "$join" || true
fi
exec "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep shards "$@" --part "$part" --parts "$SLURM_ARRAY_TASK_COUNT"
