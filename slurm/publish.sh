#!/bin/bash
# Publishes the kept checkpoints of a run, the oldest first, each with its results where there are some:
#   sbatch slurm/publish.sh --run RUN [--results RESULTS] --to hub:ORG/NAME [options of python -m pipeline publish]
# To a folder, --to dir:PATH, only the newest goes: push that from a node that reaches the hub.
#SBATCH --job-name=publish
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
[ -e "$SCRIPTS/common.sh" ] || SCRIPTS=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\)\/[^ ]*.*/\1/p' | head -n 1)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"

# Prints the commands, a line each.
commands() {
  local run results to found checkpoints checkpoint own rest
  run=$(value_of --run "$@")
  results=$(value_of --results "$@")
  to=$(value_of --to "$@")
  if [ -z "$run" ] || [ -z "$to" ]; then die "--run and --to are needed: the run, and hub:ORG/NAME or dir:PATH."; fi
  [ -z "$results" ] || [ -d "$results" ] || die "--results is $results, which is no folder; leave it out to publish without."
  found=$(checkpoints_of "$run")
  mapfile -t checkpoints <<<"$found"
  [[ $to != dir:* ]] || checkpoints=("${checkpoints[-1]}")
  mapfile -d '' -t rest < <(without "--run --results" "$@")
  for checkpoint in "${checkpoints[@]}"; do
    own=()
    [ ! -d "$results/$(basename "$checkpoint")" ] || own=(--results "$results/$(basename "$checkpoint")")
    typed "${SITE_LAUNCH[@]}" "$PYTHON" -m pipeline publish "$checkpoint" "${own[@]}" "${rest[@]}"
  done
}

job() {
  local found
  site_prepare
  found=$(commands "$@")
  eval "$found"
}

dry_run() {
  commands "$@"
  show_submission "${SITE_CPU[@]}" "$SCRIPTS/publish.sh" "$@"
}

run_script "$@"
