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

take_test "$@" && testing=true || testing=false
$testing || [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || die "this is an array job: submit it with sbatch --array=1-N, or add --test."
set -- "${ARGUMENTS[@]}"
out=$(value_of --out "$@")
[ -n "$out" ] || die "--out is not given; name the folder of the shard set."

# JOIN is what sbatch is given to have the parts of an array joined.
join_after() {
  local join
  join=$(typed env PYTHONPATH="$PYTHONPATH" "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep join "$out")
  JOIN=("${SITE_CPU[@]}" --dependency="afterok:$1" --kill-on-invalid-dep=yes --job-name=join-shards --ntasks=1
    --output=%x-%j.txt --wrap "$join")
}

if $testing; then
  parts=$(sed -n 's/^#SBATCH --array=1-//p' "$SCRIPTS/prepare_shards.sh")
  echo "$parts parts (sbatch --array=1-N makes N):"
  for ((part = 1; part <= parts; part++)); do
    echo "  $part: $(typed "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep shards "$@" --part "$part" --parts "$parts")"
  done
  join_after THE_ARRAY
  echo "which the first part follows with: sbatch $(typed "${JOIN[@]}")"
  test_submission "${SITE_CPU[@]}" "$SCRIPTS/prepare_shards.sh" "$@"
  exit
fi
site_prepare
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
if [ "$part" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
  join_after "$SLURM_ARRAY_JOB_ID"
  submit_job "${JOIN[@]}" || true
fi
exec "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep shards "$@" --part "$part" --parts "$SLURM_ARRAY_TASK_COUNT"
