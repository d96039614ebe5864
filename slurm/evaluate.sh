#!/bin/bash
# Measures the checkpoints of a run, one task of the array for each checkpoint and evaluation task:
#   sbatch --array=0-5 slurm/evaluate.sh --run RUN --shards SHARDS --out RESULTS [--tasks density,linear_probe] [options]
# Options are those of python -m pipeline evaluate. Results of a checkpoint are in RESULTS/step-<n>; numbers of the array
# beyond checkpoints x tasks have nothing to do.
#SBATCH --job-name=evaluate
#SBATCH --array=0-2
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.txt
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
[ -e "$SCRIPTS/common.sh" ] || SCRIPTS=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\([^ ]*\)\/[^ ]*.*/\1/p' | head -n 1)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"

if take_test "$@"; then
  echo "would be submitted: sbatch $SCRIPTS/evaluate.sh ${ARGUMENTS[*]}"
  sbatch --test-only "$SCRIPTS/evaluate.sh"
  exit
fi
[ -n "${SLURM_ARRAY_JOB_ID:-}" ] || die "this is an array job: submit it with sbatch --array=0-N, or add --test."
run=$(value_of --run "$@")
out=$(value_of --out "$@")
if [ -z "$run" ] || [ -z "$out" ]; then die "--run and --out are needed: the run, and the folder of results."; fi
tasks=$(value_of --tasks "$@")
IFS=, read -ra tasks <<<"${tasks:-density,linear_probe,completions}"
mapfile -t checkpoints < <(find "$run/checkpoints" -maxdepth 1 -type d -name 'step-*[0-9]' | sort)
number=$SLURM_ARRAY_TASK_ID
if [ "$number" -ge $((${#checkpoints[@]} * ${#tasks[@]})) ]; then
  echo "$run has ${#checkpoints[@]} checkpoints, and ${#tasks[@]} tasks are asked for: number $number has nothing to do"
  exit
fi
checkpoint=${checkpoints[$((number / ${#tasks[@]}))]}
rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --run | --out | --tasks) shift 2 ;;
    --run=* | --out=* | --tasks=*) shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
site_prepare
exec "${SITE_LAUNCH[@]}" "$PYTHON" -m pipeline evaluate "$checkpoint" --out "$out/$(basename "$checkpoint")" \
  --tasks "${tasks[$((number % ${#tasks[@]}))]}" "${rest[@]}"
