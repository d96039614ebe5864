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

take_test "$@" && testing=true || testing=false
$testing || [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: submit it with sbatch, or add --test to see what it would do."
set -- "${ARGUMENTS[@]}"
run=$(value_of --run "$@")
results=$(value_of --results "$@")
to=$(value_of --to "$@")
if [ -z "$run" ] || [ -z "$to" ]; then die "--run and --to are needed: the run, and hub:ORG/NAME or dir:PATH."; fi
[ -z "$results" ] || [ -d "$results" ] || die "--results is $results, which is no folder; leave it out to publish without."
mapfile -t checkpoints < <(checkpoints_of "$run")
[ ${#checkpoints[@]} -gt 0 ] || die "$run holds no checkpoints; name the folder of a run."
[[ $to != dir:* ]] || checkpoints=("${checkpoints[-1]}")
without "--run --results" "$@"
$testing || site_prepare
for checkpoint in "${checkpoints[@]}"; do
  own=()
  [ ! -d "$results/$(basename "$checkpoint")" ] || own=(--results "$results/$(basename "$checkpoint")")
  command=("${SITE_LAUNCH[@]}" "$PYTHON" -m pipeline publish "$checkpoint" "${own[@]}" "${REST[@]}")
  if $testing; then typed "${command[@]}"; else "${command[@]}"; fi
done
! $testing || test_submission "${SITE_CPU[@]}" "$SCRIPTS/publish.sh" "$@"
