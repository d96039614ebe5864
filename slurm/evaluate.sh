#!/bin/bash
# Measures the checkpoints of a run, one task of the array for each checkpoint and evaluation task:
#   sbatch --array=0-5 slurm/evaluate.sh --run RUN --shards SHARDS --out RESULTS [--tasks density,linear_probe] [options]
# Options are those of python -m pipeline evaluate. Results of a checkpoint are in RESULTS/step-<n>; numbers of the array
# beyond checkpoints x tasks have nothing to do (`slurm/evaluate.sh --dry-run ...` counts them).
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

# Prints the evaluations, one checkpoint and one task a line, as commands on this many accelerators.
commands() {
  local accelerators=$1 run out found checkpoints checkpoint tasks task launch rest
  shift
  run=$(value_of --run "$@")
  out=$(value_of --out "$@")
  if [ -z "$run" ] || [ -z "$out" ] || [ -z "$(value_of --shards "$@")" ]; then
    die "--run, --shards and --out are needed: the run, the shard set, and the folder of results."
  fi
  found=$(checkpoints_of "$run")
  mapfile -t checkpoints <<<"$found"
  IFS=, read -ra tasks <<<"$(value_of --tasks "$@")"
  [ ${#tasks[@]} -gt 0 ] || tasks=(density linear_probe completions)
  launch=(-m pipeline)
  if [ "$accelerators" -gt 1 ]; then # a rank each
    launch=(-m torch.distributed.run --standalone --nproc_per_node="$accelerators" -m -- pipeline)
  fi
  mapfile -d '' -t rest < <(without "--run --out --tasks" "$@")
  for checkpoint in "${checkpoints[@]}"; do
    for task in "${tasks[@]}"; do
      typed "${SITE_LAUNCH[@]}" "$PYTHON" "${launch[@]}" evaluate "$checkpoint" --out "$out/$(basename "$checkpoint")" \
        --tasks "$task" "${rest[@]}"
    done
  done
}

job() {
  local found evaluations
  site_prepare
  found=$(commands "${SLURM_GPUS_ON_NODE:-0}" "$@")
  mapfile -t evaluations <<<"$found"
  if [ "$SLURM_ARRAY_TASK_ID" -ge ${#evaluations[@]} ]; then
    echo "number $SLURM_ARRAY_TASK_ID of the array has nothing to do: there are ${#evaluations[@]} evaluations"
    return
  fi
  eval "exec ${evaluations[SLURM_ARRAY_TASK_ID]}"
}

dry_run() {
  local accelerators found
  accelerators=$(value_of --gpus-per-node "${SITE_EVALUATE[@]}" --gpus-per-node="$ACCELERATORS_PER_NODE")
  found=$(commands "${accelerators##*:}" "$@")
  echo "each kept checkpoint with each task, by its number in the array:"
  awk '{ print "  " NR - 1 ": " $0 }' <<<"$found"
  show_submission "${SITE_EVALUATE[@]}" --array="0-$(($(wc -l <<<"$found") - 1))" "$SCRIPTS/evaluate.sh" "$@"
}

run_script "$@"
