#!/bin/bash
# Measures the checkpoints of a run, one task of the array for each checkpoint and evaluation task:
#   sbatch --array=0-5 slurm/evaluate.sh --run RUN --shards SHARDS --out RESULTS [--tasks density,linear_probe] [options]
# Options are those of python -m pipeline evaluate. Results of a checkpoint are in RESULTS/step-<n>; numbers of the array
# beyond checkpoints x tasks have nothing to do (`slurm/evaluate.sh --test ...` counts them).
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

take_test "$@" && testing=true || testing=false
$testing || [ -n "${SLURM_ARRAY_JOB_ID:-}" ] || die "this is an array job: submit it with sbatch --array=0-N, or add --test."
set -- "${ARGUMENTS[@]}"
run=$(value_of --run "$@")
out=$(value_of --out "$@")
if [ -z "$run" ] || [ -z "$out" ] || [ -z "$(value_of --shards "$@")" ]; then
  die "--run, --shards and --out are needed: the run, the shard set, and the folder of results."
fi
IFS=, read -ra tasks <<<"$(value_of --tasks "$@")"
[ ${#tasks[@]} -gt 0 ] || tasks=(density linear_probe completions)
mapfile -t checkpoints < <(checkpoints_of "$run")
[ ${#checkpoints[@]} -gt 0 ] || die "$run holds no checkpoints; name the folder of a run."
numbers=$((${#checkpoints[@]} * ${#tasks[@]}))
granted=${SLURM_GPUS_ON_NODE:-0}
! $testing || granted=$(value_of --gpus-per-node "${SITE_EVALUATE[@]}" --gpus-per-node="$ACCELERATORS_PER_NODE")
granted=${granted##*:}
launch=("$PYTHON" -m pipeline)
if [ "$granted" -gt 1 ]; then # a rank each
  launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$granted" -m -- pipeline)
fi
without "--run --out --tasks" "$@"

# COMMAND is what a number of the array runs.
command_of() {
  local checkpoint=${checkpoints[$(($1 / ${#tasks[@]}))]}
  COMMAND=("${SITE_LAUNCH[@]}" "${launch[@]}" evaluate "$checkpoint" --out "$out/$(basename "$checkpoint")"
    --tasks "${tasks[$(($1 % ${#tasks[@]}))]}" "${REST[@]}")
}

found="$run has ${#checkpoints[@]} checkpoints, and ${#tasks[@]} tasks are asked for"
if $testing; then
  echo "$found:"
  for ((number = 0; number < numbers; number++)); do
    command_of "$number"
    echo "  $number: $(typed "${COMMAND[@]}")"
  done
  test_submission "${SITE_EVALUATE[@]}" --array="0-$((numbers - 1))" "$SCRIPTS/evaluate.sh" "$@"
elif [ "$SLURM_ARRAY_TASK_ID" -ge "$numbers" ]; then
  echo "$found: number $SLURM_ARRAY_TASK_ID has nothing to do"
else
  site_prepare
  command_of "$SLURM_ARRAY_TASK_ID"
  exec "${COMMAND[@]}"
fi
