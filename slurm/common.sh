# What the job scripts share. Sourced, with SCRIPTS set to this folder.
# shellcheck shell=bash
set -euo pipefail

REPOSITORY=$(cd "$SCRIPTS/.." && pwd)
SITE_FILE=${SITE_FILE:-$SCRIPTS/site.sh}
# shellcheck source=site.sh
source "$SITE_FILE"
PYTHON=${SITE_PYTHON:-$REPOSITORY/.venv/bin/python}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
export OMP_WAIT_POLICY=passive

# The pipeline's Python, in the container if there is one.
run_python() {
  "${SITE_LAUNCH[@]}" "$PYTHON" "$@"
}

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

# The arguments without those options and what follows them, in REST.
without() {
  local options=" $1 "
  shift
  REST=()
  while [ $# -gt 0 ]; do
    if [[ $options == *" ${1%%=*} "* ]]; then
      [[ $1 == *=* ]] || shift
    else
      REST+=("$1")
    fi
    shift || true
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

# NODES, RANKS_PER_NODE, RANKS and the address where they meet, from what SLURM granted. Four ports after MASTER_PORT are
# the preflight's.
describe_ranks() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "this is a job script: submit it with sbatch, or add --test to see what it would do."
  NODES=$SLURM_JOB_NUM_NODES
  RANKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
  [ "$RANKS_PER_NODE" -gt 0 ] || RANKS_PER_NODE=$(((${SLURM_NTASKS:-$NODES} + NODES - 1) / NODES)) # sbatch --ntasks
  if [ "$ACCELERATORS_PER_NODE" -gt 0 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ]; then
    die "site.sh says $ACCELERATORS_PER_NODE accelerators a node, but the job was given none: \`source slurm/site.sh\`" \
      "before sbatch, or give sbatch --gpus-per-node=$ACCELERATORS_PER_NODE."
  fi
  RANKS=$((NODES * RANKS_PER_NODE))
  NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
  MASTER_ADDR=${NODE_NAMES%%,*}
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 2500 * 5)) # below 32768, where Linux takes ports for anyone
  export MASTER_ADDR MASTER_PORT
}

# Looks at every node before training. A fault of all nodes ends the job as a mistake; after one of some, it is queued
# again without them.
preflight() {
  local run=$1 word
  [ "$PREFLIGHT_SECONDS" -gt 0 ] || return 0
  shift
  set -- -m pipeline preflight --nodes "$NODE_NAMES" --accelerators "$ACCELERATORS_PER_NODE" \
    --seconds "$PREFLIGHT_SECONDS" "$@"
  word=$(
    set +o pipefail
    # Four times: the meeting of all and three of pairs.
    timeout --kill-after=10 $((4 * PREFLIGHT_SECONDS + 60)) srun --nodes="$NODES" --ntasks="$NODES" \
      --ntasks-per-node=1 --cpu-bind=none --wait=0 --kill-on-bad-exit=0 "${SITE_LAUNCH[@]}" "$PYTHON" "$@" </dev/null |
      run_python "$@" --judge
  ) || exit 2
  case $word in
    sound) ;;
    exclude\ *) again "${word#exclude }" ;;
    doubt\ *) if has_others "${word#doubt }"; then again "${word#doubt }"; fi ;;&
    *)
      CODE=1
      what_follows "$run" "the look at the nodes"
      again
      ;;
  esac
}

# Whether this job can do without both of two nodes: its partition has as many others, and MAX_EXCLUDED allows it.
has_others() {
  local others left
  left=$(left_out "$1")
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    awk '$2 ~ /^(idle|mix|alloc|comp)[~#%]?$/ {print $1}' | grep -vxFc -f <(tr ',' '\n' <<<"$left")) || true
  if [ "$others" -ge "$NODES" ] && may_leave_out "$left"; then
    echo "both are left out; $others other nodes are in use or free"
  else
    echo "both are tried again; $others other nodes are in use or free, and MAX_EXCLUDED allows $MAX_EXCLUDED"
    return 1
  fi
}

# Whether no more nodes are named than MAX_EXCLUDED.
may_leave_out() {
  [ "$(tr ',' '\n' <<<"$1" | wc -l)" -le "$MAX_EXCLUDED" ]
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
  STOPPING=true
  echo "$(date +%FT%T) asked to stop: the ranks save"
  [ -z "${STEP:-}" ] || kill -USR1 "$STEP" 2>/dev/null || true
}

# Whether this start of the job was ended by scancel: by the word of SLURM in the job's log, which names a reason where it
# ends a job itself. Its state tells nothing while it ends.
was_cancelled() {
  local log
  log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
  [ -f "$log" ] && awk -v job="$SLURM_JOB_ID" '
    $0 ~ " job " job ", start " { cancelled = 0 }
    $0 ~ "JOB " job " ON .* CANCELLED AT [^ ]* \\*\\*\\*" { cancelled = 1 }
    END { exit !cancelled }' "$log"
}

# Queues this job again, without the nodes that are named; where that is not allowed, its successor (a dependency, a
# later copy of the array) goes on.
again() {
  local job=$SLURM_JOB_ID nodes
  if was_cancelled; then
    echo "the job was cancelled: it is not queued again"
    exit 75
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
    echo "it was queued $SLURM_RESTART_COUNT times again, which is MAX_RESTARTS"
    exit 1
  fi
  nodes=$(left_out "${1:-}")
  if [ -n "${1:-}" ] && ! may_leave_out "$nodes"; then
    echo "$nodes would be left out; MAX_EXCLUDED allows $MAX_EXCLUDED nodes"
    exit 1
  fi
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "the array's next copy goes on"
    [ -z "${1:-}" ] || scontrol update JobId="$SLURM_ARRAY_JOB_ID" ExcNodeList="$nodes" >/dev/null 2>&1 || true
    exit 75
  fi
  if [ "$SITE_REQUEUES" != true ]; then
    echo "SITE_REQUEUES is $SITE_REQUEUES: the job's successor goes on"
    exit 75
  fi
  trap '' TERM USR1
  reach_controller scontrol requeue "$job" || exit 75
  # Only a job that waits may be told so; SLURM is ending this script by now, and waits for it.
  [ -z "${1:-}" ] || reach_controller scontrol update JobId="$job" ExcNodeList="$nodes"
  # With --ntasks-per-node SLURM keeps the tasks of this start, and would wait for as many nodes again.
  [ -z "${SLURM_NTASKS_PER_NODE:-}" ] ||
    reach_controller scontrol update JobId="$job" NumTasks="$SLURM_NTASKS_PER_NODE" || true
  sleep 60 # the job is ended here
  exit 75
}

# Nodes that this job leaves out, with those that are named, with commas.
left_out() {
  local before
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p' | head -n 1)
  scontrol show hostnames "$before,$1" 2>/dev/null | sort -u | paste -sd, || true
}

# Runs a command of SLURM's; again for ten minutes while the controller does not answer.
reach_controller() {
  local said try
  for try in {1..60}; do
    said=$("$@" 2>&1) && return
    [[ $said != *"Job is pending"* ]] || return 0 # SLURM queued it again itself, over a lost node
    [[ $said == *[Uu]nable\ to\ contact* || $said == *onnection* ]] || break
    sleep 10
  done
  echo "after $try tries: $said"
  return 1
}

# Submits what follows a finished run, once for its last checkpoint and what is asked: the evaluation of all that are
# kept, where EVALUATE names tasks, then their publishing, where PUBLISH says where to.
follow_up() {
  local run=$1 asked shards tasks after=() measured=()
  [ -n "$EVALUATE$PUBLISH" ] || return 0
  asked="$(basename "$(checkpoints_of "$run" | tail -n 1)") EVALUATE=$EVALUATE PUBLISH=$PUBLISH"
  if grep -qxF "$asked" "$run/logs/followed.txt" 2>/dev/null; then
    echo "submitted before, as $run/logs/followed.txt says, and not again: $asked"
    return 0
  fi
  if [ -n "$EVALUATE" ]; then
    shards=$(run_python -c 'import json, sys; print(json.load(open(sys.argv[1]))["shards"]["path"])' "$run/run.json")
    tasks=$(tr ',' '\n' <<<"$EVALUATE" | wc -l)
    submit_job "${SITE_EVALUATE[@]}" --array="0-$(($(checkpoints_of "$run" | wc -l) * tasks - 1))" "$SCRIPTS/evaluate.sh" --run "$run" \
      --shards "$shards" --out "$run/results" --tasks "$EVALUATE" || return 0
    after=(--dependency="afterok:$SUBMITTED" --kill-on-invalid-dep=yes)
    measured=(--results "$run/results")
  fi
  if [ -n "$PUBLISH" ]; then
    submit_job "${SITE_CPU[@]}" "${after[@]}" "$SCRIPTS/publish.sh" --run "$run" "${measured[@]}" --to "$PUBLISH" || return 0
  fi
  echo "$asked" >>"$run/logs/followed.txt"
}

# sbatch without this job's own variables, which the other would take for its own. SUBMITTED is the job's number.
submit_job() {
  local name own=()
  for name in "${!SLURM_@}"; do
    [ "$name" = SLURM_CONF ] || own+=(--unset="$name")
  done
  if SUBMITTED=$(env "${own[@]}" sbatch --parsable "$@"); then
    echo "submitted job $SUBMITTED: sbatch $*"
  else
    echo "not submitted from here; on a login node: sbatch $*"
    return 1
  fi
}

# Folders of a run's whole checkpoints, the oldest first.
checkpoints_of() {
  find "$1/checkpoints" -maxdepth 1 -type d -name 'step-*[0-9]' 2>/dev/null | sort
}

# Trains with a recipe until the run is finished, over any number of starts of this job.
pretrain() {
  local recipe=$1 run restarts
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
  BEGAN=$(date -u +%FT%TZ)
  trap ask_to_stop USR1 TERM
  set -- --config "$REPOSITORY/configs/$recipe.yaml" "$@"
  preflight "$run" "$@"
  [ -z "${STOPPING:-}" ] || again
  rm -rf "$run/stacks"
  tail --follow=name --retry --lines=0 "$run/logs/rank-0000.txt" 2>/dev/null &
  local tail=$!
  start_ranks "$run/logs" -m pipeline train "$@"
  [ -z "${STOPPING:-}" ] || ask_to_stop # asked while they were started
  await_ranks
  sleep 1
  kill "$tail" 2>/dev/null || true
  # The stacks of a run that hung; the next start deletes them.
  tail -n +1 "$run"/stacks/*.txt 2>/dev/null || true
  what_follows "$run" "the ranks"
  if [ "$ACTION" = "done" ]; then follow_up "$run"; else again; fi
}

# ACTION is what is to be done after the ranks, or the look at the nodes, ended with CODE. Ends a job that failed.
what_follows() {
  local run=$1 asked=()
  [ -z "${STOPPING:-}" ] || asked=(--asked)
  ACTION=$(run_python -m pipeline status "$run" --after "$CODE" --since "$BEGAN" "${asked[@]}" \
    --restarts "${SLURM_RESTART_COUNT:-0}" --max_restarts "$MAX_RESTARTS" --max_accidents "$MAX_ACCIDENTS")
  echo "$(date +%FT%T) $2 ended with code $CODE: $ACTION"
  if [ "$ACTION" = failed ]; then
    tail -n 5 "$run"/logs/rank-*.txt 2>/dev/null || true
    exit 1
  fi
}

# What a job would be: the plan, and SLURM's word on the script. Submits nothing.
test_pretrain() {
  local recipe=$1 script nodes each
  shift
  script=$SCRIPTS/$(basename "$0")
  nodes=$(awk -F= '/^#SBATCH --nodes=/ {print $2}' "$script")
  each=$((ACCELERATORS_PER_NODE > 0 ? ACCELERATORS_PER_NODE : 1))
  without "--run" "$@"
  echo "$nodes nodes of $each ranks (ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE; sbatch --nodes=N takes other nodes)"
  run_python -m pipeline plan --config "$REPOSITORY/configs/$recipe.yaml" --accelerator "$ACCELERATOR" \
    --ranks $((nodes * each)) --ranks_per_node "$each" "${REST[@]}"
  echo
  [ -z "$EVALUATE" ] || echo "after it, for each kept checkpoint: slurm/evaluate.sh --tasks $EVALUATE"
  [ -z "$PUBLISH" ] || echo "after that: slurm/publish.sh --to $PUBLISH"
  test_submission "$script" "$@"
}

# What sbatch would be given, what it would take from the site's file, and its word on both.
test_submission() {
  local settings
  settings=$(env | grep '^SBATCH_' | sort | paste -sd' ' || true)
  echo "would be submitted, after \`source $SITE_FILE\`: sbatch $(typed "$@")"
  echo "sbatch takes from there: ${settings:-nothing}"
  if command -v sbatch >/dev/null; then
    sbatch --test-only "$@" || die "SLURM does not take the script now (its word is above); nothing was submitted."
  else
    echo "(there is no sbatch here to ask)"
  fi
}

# A command as one would type it.
typed() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:,=%@+-]+$ ]] || word=${word@Q}
    line+=("$word")
  done
  echo "${line[*]}"
}
