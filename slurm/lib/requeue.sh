# Decides what happens after the ranks of a training job ended: the job is done, fails, or is requeued.
# shellcheck shell=bash

# Prints what to do with a run, done, requeue or failed, after WHAT (the ranks, the health check) ended with CODE.
next_action() {
  local run=$1 since=$2 code=$3 what=$4 asked=() action
  [ -z "$STOPPING" ] || asked=(--asked)
  action=$(run_python -m pipeline status "$run" --after "$code" --since "$since" "${asked[@]}" \
    --restarts "${SLURM_RESTART_COUNT:-0}" --max_restarts "$MAX_RESTARTS" --max_failures "$MAX_FAILURES")
  echo "$(date +%FT%T) $what ended with code $code: $action" >&2
  if [ "$action" = failed ]; then
    tail -n 5 "$run"/logs/rank-*.txt >&2 2>/dev/null || true
  fi
  echo "$action"
}

# Requeues the job without the given nodes, and ends. Where jobs may not be requeued, the next job of the array or of
# the chain resumes the run.
requeue_and_exit() {
  local bad=${1:-} excluded
  if was_cancelled; then
    echo "the job was cancelled: it is not requeued"
    exit 75
  fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
    echo "the job was requeued $SLURM_RESTART_COUNT times, which is MAX_RESTARTS"
    exit 1
  fi
  excluded=$(excluded_with "$bad")
  if [ -n "$bad" ] && ! may_exclude "$excluded"; then
    echo "$excluded would be excluded; MAX_EXCLUDED allows $MAX_EXCLUDED nodes"
    exit 1
  fi
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "the next job of the array resumes the run"
    [ -z "$bad" ] || scontrol update JobId="$SLURM_ARRAY_JOB_ID" ExcNodeList="$excluded" >/dev/null 2>&1 || true
    exit 75
  fi
  if [ "$SITE_REQUEUES" != true ]; then
    echo "SITE_REQUEUES is $SITE_REQUEUES: the next job of the chain resumes the run"
    exit 75
  fi
  trap '' TERM USR1
  reach_controller scontrol requeue "$SLURM_JOB_ID" || exit 75
  # Only a pending job accepts these updates. SLURM has asked this script to end by now, and waits for it.
  [ -z "$bad" ] || reach_controller scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
  # With --ntasks-per-node SLURM retains the tasks of this start, and would wait for the same number of nodes.
  [ -z "${SLURM_NTASKS_PER_NODE:-}" ] ||
    reach_controller scontrol update JobId="$SLURM_JOB_ID" NumTasks="$SLURM_NTASKS_PER_NODE" || true
  exit 75
}

# Whether scancel ended this start of the job. SLURM's message in the job's log shows it: the message names a reason if
# SLURM ended the job itself. The job's state does not show it while the job ends.
was_cancelled() {
  local log
  log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
  [ -f "$log" ] && awk -v job="$SLURM_JOB_ID" '
    $0 ~ " job " job ", start " { cancelled = 0 }
    $0 ~ "JOB " job " ON .* CANCELLED AT [^ ]* \\*\\*\\*" { cancelled = 1 }
    END { exit !cancelled }' "$log"
}

# Runs a command of SLURM, and retries it for ten minutes while the controller does not answer.
reach_controller() {
  local answer try
  for try in {1..60}; do
    answer=$("$@" 2>&1) && return
    [[ $answer != *"Job is pending"* ]] || return 0 # SLURM requeued the job itself, after it lost a node
    [[ $answer == *[Uu]nable\ to\ contact* || $answer == *onnection* || $answer == *[Uu]nexpected\ message* ]] || break
    [ "$try" -gt 1 ] || echo "SLURM's controller does not answer: retrying for ten minutes"
    sleep 10
  done
  echo "failed after $try tries: $answer"
  return 1
}
