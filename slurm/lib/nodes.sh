# The nodes of a training job: their health check before it trains, and which of them it excludes.
# shellcheck shell=bash

# Prints the names of the job's nodes, separated by commas.
node_names() {
  scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,
}

# Checks every node before training, where PREFLIGHT_SECONDS allows it. A fault of all nodes ends the job as user error;
# after a fault of some, it is requeued without them.
check_nodes() {
  local run=$1 since=$2 nodes=$3 verdict pair action
  [ "$PREFLIGHT_SECONDS" -gt 0 ] || return 0
  shift 3
  verdict=$(preflight "$nodes" "$@") || exit 2
  case $verdict in
    ok | sound) return ;;
    exclude\ *) requeue_and_exit "${verdict#exclude }" ;;
    inconclusive\ * | doubt\ *)
      pair=${verdict#* }
      if can_exclude_both "$pair"; then requeue_and_exit "$pair"; fi
      ;;
  esac
  action=$(next_action "$run" "$since" 1 "the check of the nodes")
  [ "$action" != failed ] || exit 1
  requeue_and_exit
}

# Prints the preflight's verdict: ok, exclude NODES, inconclusive NODES, or anything else for another try. Fails where the
# options are invalid and where all nodes share a fault.
preflight() {
  set -- -m pipeline preflight --nodes "$1" --accelerators "$ACCELERATORS_PER_NODE" --seconds "$PREFLIGHT_SECONDS" "${@:2}"
  set +o pipefail # the verdict counts, not how srun ended
  # Four times: the all-reduce of all nodes and three of pairs.
  timeout --kill-after=10 $((4 * PREFLIGHT_SECONDS + 60)) srun --nodes="$SLURM_JOB_NUM_NODES" \
    --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --wait=0 --kill-on-bad-exit=0 \
    "${SITE_LAUNCH[@]}" "$PYTHON" "$@" </dev/null | run_python "$@" --judge
}

# Whether this job can do without both of two nodes: its partition has as many others, and MAX_EXCLUDED allows it.
can_exclude_both() {
  local excluded others
  excluded=$(excluded_with "$1")
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    awk '$2 ~ /^(idle|mix|alloc|comp)[~#%]?$/ {print $1}' | grep -vxFc -f <(tr ',' '\n' <<<"$excluded")) || true
  if [ "$others" -ge "$SLURM_JOB_NUM_NODES" ] && may_exclude "$excluded"; then
    echo "both are excluded; $others other nodes are in use or free"
  else
    echo "both are tried again; $others other nodes are in use or free, and MAX_EXCLUDED allows $MAX_EXCLUDED"
    return 1
  fi
}

# Whether these nodes, separated by commas, are no more than MAX_EXCLUDED.
may_exclude() {
  [ "$(tr ',' '\n' <<<"$1" | wc -l)" -le "$MAX_EXCLUDED" ]
}

# Prints the nodes that this job excludes already, with the given ones, separated by commas.
excluded_with() {
  local before
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p' | head -n 1) || true
  scontrol show hostnames "$before,$1" 2>/dev/null | sort -u | paste -sd, || true
}
