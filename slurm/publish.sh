#!/bin/bash
# Publishes the saved checkpoints of a run, the oldest first, each with its results if it has some:
#   sbatch slurm/publish.sh --run RUN [--results RESULTS] --to hub:ORG/NAME [options of python -m pipeline publish]
# With --to dir:PATH it writes only the newest to that folder; publish the folder from a node with internet access.
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

# Prints the commands, one a line.
commands() {
  local run results to found checkpoints checkpoint own rest
  run=$(value_of --run "$@")
  results=$(value_of --results "$@")
  to=$(value_of --to "$@")
  if [ -z "$run" ] || [ -z "$to" ]; then die "give --run and --to: the run, and hub:ORG/NAME or dir:PATH."; fi
  [ -z "$results" ] || [ -d "$results" ] ||
    die "--results is $results, which is not a folder; give the folder of the results, or omit --results."
  found=$(checkpoints_of "$run")
  mapfile -t checkpoints <<<"$found"
  [[ $to != dir:* ]] || checkpoints=("${checkpoints[-1]}")
  mapfile -d '' -t rest < <(without_options "--run --results" "$@")
  for checkpoint in "${checkpoints[@]}"; do
    own=()
    [ ! -d "$results/$(basename "$checkpoint")" ] || own=(--results "$results/$(basename "$checkpoint")")
    quoted "${SITE_LAUNCH[@]}" "$PYTHON" -m pipeline publish "$checkpoint" "${own[@]}" "${rest[@]}"
  done
}

job() {
  local found
  prepare_python jsonargparse numpy safetensors torch transformers yaml
  found=$(commands "$@")
  eval "$found"
}

dry_run() {
  prepare_python jsonargparse numpy safetensors torch transformers yaml
  commands "$@"
  show_submission "${SITE_CPU[@]}" "$SCRIPTS/publish.sh" "$@"
}

run_script "$@"
