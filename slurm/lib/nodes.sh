# The nodes of a training job: their health checks before it trains, and the nodes that it excludes.
# shellcheck shell=bash

# Prints the names of the job's nodes, separated by commas.
node_names() {
  scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,
}

# Checks every node before training, unless PREFLIGHT_SECONDS is 0. A fault of all nodes ends the job as user error.
# After a fault of some nodes the job is requeued without them.
check_nodes() {
  local run=$1 since=$2 nodes=$3 result pair action
  [ "$PREFLIGHT_SECONDS" -gt 0 ] || return 0
  shift 3
  result=$(preflight "$nodes" "$@") || exit 2
  case $result in
    ok | sound) return ;; # sound, doubt: words of earlier versions
    exclude\ *) requeue_and_exit "${result#exclude }" ;;
    inconclusive\ * | doubt\ *)
      pair=${result#* }
      if can_exclude_both "$pair"; then requeue_and_exit "$pair"; fi
      ;;
  esac
  action=$(next_action "$run" "$since" 1 "the health check")
  [ "$action" != failed ] || exit 1
  requeue_and_exit
}

# Prints the result of the health checks: ok, exclude NODES, inconclusive NODES, or anything else for a retry. Fails if
# the options are invalid or all nodes have the same fault.
preflight() {
  set -- -m pipeline preflight --nodes "$1" --accelerators "$ACCELERATORS_PER_NODE" --seconds "$PREFLIGHT_SECONDS" "${@:2}"
  set +o pipefail # the result counts, not the exit code of srun
  unset SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_CPUS_PER_GPU # a rank's; the check of a node has all its CPUs
  # The all-reduce between all nodes takes up to PREFLIGHT_SECONDS, and three between pairs up to half of that each.
  timeout --kill-after=10 $((4 * PREFLIGHT_SECONDS + 60)) srun --nodes="$SLURM_JOB_NUM_NODES" \
    --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$(cpus_per_node)" --cpu-bind=none --wait=0 \
    --kill-on-bad-exit=0 "${SITE_LAUNCH[@]}" "$PYTHON" "$@" </dev/null | run_python "$@" --aggregate
}

# Whether this job can exclude both of two nodes: its partition has enough others, and MAX_EXCLUDED allows it.
can_exclude_both() {
  local excluded others
  excluded=$(excluded_with "$1")
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    awk '$2 ~ /^(idle|mix|alloc|comp)[~#%]?$/ {print $1}' | grep -vxFc -f <(tr ',' '\n' <<<"$excluded")) || true
  if [ "$others" -ge "$SLURM_JOB_NUM_NODES" ] && may_exclude "$excluded"; then
    echo "both are excluded; $others other nodes are in use or idle"
  else
    echo "both are retried; $others other nodes are in use or idle, and MAX_EXCLUDED is $MAX_EXCLUDED"
    return 1
  fi
}

# Whether these nodes, separated by commas, are at most MAX_EXCLUDED.
may_exclude() {
  [ "$(tr ',' '\n' <<<"$1" | wc -l)" -le "$MAX_EXCLUDED" ]
}

# Prints the nodes that this job already excludes and the given ones, separated by commas.
excluded_with() {
  local before
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p' | head -n 1) || true
  scontrol show hostnames "$before,$1" 2>/dev/null | sort -u | paste -sd, || true
}
