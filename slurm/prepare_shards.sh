#!/bin/bash
# Prepares a shard set by an array of jobs, one for each part; the first submits a job that joins the parts after the
# array:
#   sbatch --array=1-10 slurm/prepare_shards.sh --config configs/data/imagenet.yaml --source.path IMAGES \
#       --palette.file palette.npy --out SHARDS
# A part can be restarted. The jobs need no accelerator: if site.sh requests some, pass sbatch --gpus-per-node=0.
# A work item is a shard of 8,192 images, or a source tar; parts beyond the number of work items have nothing to do.
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

# Prints the command of a part.
command_of() {
  local part=$1 parts=$2
  shift 2
  quoted "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep shards "$@" --part "$part" --parts "$parts"
}

# Prints the arguments of sbatch for the job that joins the parts after an array, NUL-separated.
join_after() {
  local array=$1 out join
  shift
  out=$(value_of --out "$@")
  [ -n "$out" ] || die "--out is not given; give the folder of the shard set."
  join=$(quoted env PYTHONPATH="$PYTHONPATH" "${SITE_LAUNCH[@]}" "$PYTHON" -m data_prep join "$out")
  print0 "${SITE_CPU[@]}" --dependency="afterok:$array" --kill-on-invalid-dep=yes --job-name=join-shards --ntasks=1 \
    --output=%x-%j.txt --wrap "$join"
}

job() {
  local part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1)) join
  prepare_python jsonargparse numpy yaml
  mapfile -d '' -t join < <(join_after "$SLURM_ARRAY_JOB_ID" "$@")
  [ ${#join[@]} -gt 0 ] || exit 2
  if [ "$part" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    submit_job "${join[@]}" >/dev/null || true
  fi
  eval "exec $(command_of "$part" "$SLURM_ARRAY_TASK_COUNT" "$@")"
}

dry_run() {
  local part parts join
  prepare_python jsonargparse numpy yaml
  parts=$(sed -n 's/^#SBATCH --array=1-//p' "$0")
  mapfile -d '' -t join < <(join_after THE_ARRAY "$@")
  [ ${#join[@]} -gt 0 ] || exit 2
  echo "$parts parts (sbatch --array=1-N changes their number):"
  for ((part = 1; part <= parts; part++)); do
    echo "  $part: $(command_of "$part" "$parts" "$@")"
  done
  echo "the first part submits: sbatch $(quoted "${join[@]}")"
  show_submission "${SITE_CPU[@]}" "$SCRIPTS/prepare_shards.sh" "$@"
}

run_script "$@"
