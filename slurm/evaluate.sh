#!/bin/bash
# Evaluates the checkpoints of a run; each job of the array evaluates one checkpoint on one task:
#   sbatch --array=0-5 slurm/evaluate.sh --run RUN --shards SHARDS --out RESULTS [--tasks density,linear_probe] [options]
# The options are those of python -m pipeline evaluate; without --tasks it runs density, linear_probe and completions.
# RESULTS/step-<n> has the results of a checkpoint. The array
# needs checkpoints x tasks jobs (`slurm/evaluate.sh --dry-run ...` counts them); further jobs do nothing.
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

# Prints the commands, one line for each checkpoint and task, for this many accelerators.
commands() {
  local accelerators=$1 run out found checkpoints checkpoint tasks task launch rest
  shift
  run=$(value_of --run "$@")
  out=$(value_of --out "$@")
  if [ -z "$run" ] || [ -z "$out" ] || [ -z "$(value_of --shards "$@")" ]; then
    die "give --run, --shards and --out: the run, the shard set, and the folder for results."
  fi
  found=$(checkpoints_of "$run")
  mapfile -t checkpoints <<<"$found"
  IFS=, read -ra tasks <<<"$(value_of --tasks "$@")"
  [ ${#tasks[@]} -gt 0 ] || tasks=(density linear_probe completions)
  launch=(-m pipeline)
  if [ "$accelerators" -gt 1 ]; then # a rank each
    launch=(-m torch.distributed.run --standalone --nproc_per_node="$accelerators" -m -- pipeline)
  fi
  mapfile -d '' -t rest < <(without_options "--run --out --tasks" "$@")
  for checkpoint in "${checkpoints[@]}"; do
    for task in "${tasks[@]}"; do
      quoted "${SITE_LAUNCH[@]}" "$PYTHON" "${launch[@]}" evaluate "$checkpoint" --out "$out/$(basename "$checkpoint")" \
        --tasks "$task" "${rest[@]}"
    done
  done
}

job() {
  local found evaluations accelerators=${SLURM_GPUS_ON_NODE:-0}
  prepare_python jsonargparse numpy safetensors torch transformers yaml
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(cpus_per_rank $((accelerators > 0 ? accelerators : 1)))}
  found=$(commands "$accelerators" "$@")
  mapfile -t evaluations <<<"$found"
  if [ "$SLURM_ARRAY_TASK_ID" -ge ${#evaluations[@]} ]; then
    echo "job $SLURM_ARRAY_TASK_ID of the array has nothing to do: there are ${#evaluations[@]} evaluations"
    return
  fi
  eval "exec ${evaluations[SLURM_ARRAY_TASK_ID]}"
}

dry_run() {
  local accelerators found
  prepare_python jsonargparse numpy safetensors torch transformers yaml
  accelerators=$(value_of --gpus-per-node "${SITE_EVALUATE[@]}")
  [ -n "$accelerators" ] || find_accelerators
  accelerators=${accelerators:-$ACCELERATORS_PER_NODE}
  found=$(commands "${accelerators##*:}" "$@")
  echo "each saved checkpoint with each task, by its number in the array:"
  awk '{ print "  " NR - 1 ": " $0 }' <<<"$found"
  show_submission "${SITE_EVALUATE[@]}" --array="0-$(($(wc -l <<<"$found") - 1))" "$SCRIPTS/evaluate.sh" "$@"
}

run_script "$@"
