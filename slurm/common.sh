# What the job scripts share. Sourced, with SCRIPTS set to this folder.
# shellcheck shell=bash
set -euo pipefail

REPOSITORY=$(cd "$SCRIPTS/.." && pwd)
# shellcheck source=site.sh
source "${SITE_FILE:-$SCRIPTS/site.sh}"
PYTHON=${SITE_PYTHON:-$REPOSITORY/.venv/bin/python}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
export OMP_WAIT_POLICY=passive

die() {
  echo "error: $*" >&2
  exit 2
}

# The value that follows an option among arguments, as --option VALUE or --option=VALUE.
value_of() {
  local option=$1
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$option") echo "${2:-}"; return ;;
      "$option"=*) echo "${1#*=}"; return ;;
    esac
    shift
  done
}

# Whether --test is among the arguments; ARGUMENTS are the others.
take_test() {
  local test=1 argument
  ARGUMENTS=()
  for argument in "$@"; do
    if [ "$argument" = --test ]; then test=0; else ARGUMENTS+=("$argument"); fi
  done
  return $test
}

# NODES, RANKS_PER_NODE, RANKS and the address where they meet, from what SLURM granted.
describe_ranks() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: submit it with sbatch, or add --test to see what it would do."
  NODES=$SLURM_JOB_NUM_NODES
  RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  if [ "$ACCELERATORS_PER_NODE" -gt 0 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ]; then
    die "site.sh says $ACCELERATORS_PER_NODE accelerators a node, but the job was given none: \`source slurm/site.sh\`" \
      "before sbatch, or give sbatch --gpus-per-node=$ACCELERATORS_PER_NODE."
  fi
  RANKS=$((NODES * RANKS_PER_NODE))
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
  export MASTER_ADDR MASTER_PORT
}

# One process a rank, ranks of a node next to each other (stages of one pipeline are neighbours). Runs in the background.
# What is left 30 s after the first rank ended is killed: not at once, or the sentence and the code of a mistake are lost.
start_ranks() {
  local logs=$1
  shift
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
  srun --nodes="$NODES" --ntasks="$RANKS" --ntasks-per-node="$RANKS_PER_NODE" --distribution=block:block \
    --cpu-bind=none --wait=30 --open-mode=append --output="$logs/rank-%4t.txt" \
    "${SITE_LAUNCH[@]}" "$PYTHON" "$@" &
  STEP=$!
}

# Waits for the ranks through any number of signals. CODE is what they ended with.
await_ranks() {
  while :; do
    CODE=0
    wait "$STEP" || CODE=$?
    kill -0 "$STEP" 2>/dev/null || break
  done
}

# Asks the ranks to stop at the next step boundary: they save, and the script goes on after `await_ranks`.
ask_to_stop() {
  echo "$(date +%FT%T) asked to stop: the ranks save"
  [ -z "${STEP:-}" ] || kill -USR1 "$STEP" 2>/dev/null || true
}

# Queues this job again; where that is not allowed, its successor (a dependency, a later copy of the array) goes on.
requeue() {
  local job=$SLURM_JOB_ID
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "the array's next copy goes on"
    exit 75
  fi
  if [ "$SITE_REQUEUES" != true ]; then
    echo "SITE_REQUEUES is $SITE_REQUEUES: the job's successor goes on"
    exit 75
  fi
  trap '' TERM USR1
  scontrol requeue "$job"
  sleep 60 # the job is ended here
}

# Submits the evaluation of a finished run's checkpoints, once, where EVALUATE names tasks.
follow_up() {
  local run=$1 shards=$2 checkpoints tasks
  if [ -z "$EVALUATE" ] || [ -e "$run/logs/evaluation.txt" ]; then return 0; fi
  checkpoints=$(find "$run/checkpoints" -maxdepth 1 -type d -name 'step-*[0-9]' | wc -l)
  tasks=$(tr ',' '\n' <<<"$EVALUATE" | wc -l)
  sbatch --array="0-$((checkpoints * tasks - 1))" "$SCRIPTS/evaluate.sh" --run "$run" --shards "$shards" \
    --out "$run/results" --tasks "$EVALUATE" | tee "$run/logs/evaluation.txt"
}

# Trains with a recipe until the run is finished, over any number of starts of this job.
pretrain() {
  local recipe=$1 run action restarts
  shift
  if take_test "$@"; then
    test_pretrain "$recipe" "${ARGUMENTS[@]}"
    return
  fi
  run=$(value_of --run "$@")
  [ -n "$run" ] || die "--run is not given; name the folder of the run, new or of an earlier job."
  describe_ranks
  site_prepare
  restarts=${SLURM_RESTART_COUNT:-0}
  mkdir -p "$run/logs"
  echo "$(date +%FT%T) job $SLURM_JOB_ID, start $((restarts + 1)): $RANKS ranks on $SLURM_JOB_NODELIST" | tee -a "$run/logs/jobs.txt"
  trap ask_to_stop USR1 TERM
  tail --follow=name --retry --lines=0 "$run/logs/rank-0000.txt" 2>/dev/null &
  local tail=$!
  start_ranks "$run/logs" -m pipeline train --config "$REPOSITORY/configs/$recipe.yaml" "$@"
  await_ranks
  sleep 1
  kill "$tail" 2>/dev/null || true
  action=$("$PYTHON" -m pipeline status "$run" --after "$CODE" --restarts "$restarts" \
    --max_restarts "$MAX_RESTARTS" --max_accidents "$MAX_ACCIDENTS")
  echo "$(date +%FT%T) the ranks ended with code $CODE: $action"
  case $action in
    done) follow_up "$run" "$(value_of --data.shards "$@")" ;;
    requeue) requeue ;;
    *)
      tail -n 5 "$run"/logs/rank-*.txt
      exit 1
      ;;
  esac
}

# What a job would be: the plan, and SLURM's word on the script. Submits nothing.
test_pretrain() {
  local recipe=$1 script ranks
  shift
  script=$SCRIPTS/$(basename "$0")
  ranks=$(awk -F= '/^#SBATCH --nodes=/ {print $2}' "$script")
  ranks=$((ranks * (ACCELERATORS_PER_NODE > 0 ? ACCELERATORS_PER_NODE : 1)))
  "$PYTHON" -m pipeline plan --config "$REPOSITORY/configs/$recipe.yaml" --accelerator "$ACCELERATOR" --ranks "$ranks" \
    "$@"
  echo
  echo "would be submitted: sbatch $script"
  sbatch --test-only "$script"
}
