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
if [ -z "$run" ] || [ -z "$out" ]; then die "--run and --out are needed: the run, and the folder of results."; fi
IFS=, read -ra tasks <<<"$(value_of --tasks "$@")"
[ ${#tasks[@]} -gt 0 ] || tasks=(density linear_probe completions)
mapfile -t checkpoints < <(checkpoints_of "$run")
[ ${#checkpoints[@]} -gt 0 ] || die "$run holds no checkpoints; name the folder of a run."
numbers=$((${#checkpoints[@]} * ${#tasks[@]}))
if $testing; then
  echo "$run has ${#checkpoints[@]} checkpoints, and ${#tasks[@]} tasks are asked for: --array=0-$((numbers - 1))"
  test_script "$SCRIPTS/evaluate.sh" "$@"
  exit
fi
number=$SLURM_ARRAY_TASK_ID
if [ "$number" -ge "$numbers" ]; then
  echo "$run has ${#checkpoints[@]} checkpoints, and ${#tasks[@]} tasks are asked for: number $number has nothing to do"
  exit
fi
checkpoint=${checkpoints[$((number / ${#tasks[@]}))]}
site_prepare
without "--run --out --tasks" "$@"
launch=("$PYTHON" -m pipeline)
if [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then # a rank each
  launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$SLURM_GPUS_ON_NODE" -m -- pipeline)
fi
exec "${SITE_LAUNCH[@]}" "${launch[@]}" evaluate "$checkpoint" --out "$out/$(basename "$checkpoint")" \
  --tasks "${tasks[$((number % ${#tasks[@]}))]}" "${REST[@]}"
