# The ranks of a training job: started, waited for, and asked to stop.
# shellcheck shell=bash

# What the handler of signals shares with the job: whether it was asked to stop, and the srun of the ranks.
STOPPING=''
RANKS_PID=''

# Prints how many ranks a node runs, from what SLURM granted.
ranks_per_node() {
  local each=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}} nodes=$SLURM_JOB_NUM_NODES
  if [ "$ACCELERATORS_PER_NODE" -gt 0 ] && [ "${SLURM_GPUS_ON_NODE:-0}" -eq 0 ]; then
    die "ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE in site.sh, but the job was given none: \`source slurm/site.sh\`" \
      "before sbatch, or give sbatch --gpus-per-node=$ACCELERATORS_PER_NODE."
  fi
  [ "$each" -gt 0 ] || each=$(((${SLURM_NTASKS:-$nodes} + nodes - 1) / nodes)) # sbatch --ntasks
  echo "$each"
}

# Becomes the srun of one process a rank, to be started in the background. Ranks of a node are next to each other: stages
# of one pipeline are neighbors. What is left 30 s after the first rank ended is killed: not at once, or the message and
# the code of a user error are lost.
run_ranks() {
  local ranks=$1 ranks_per_node=$2 logs=$3
  shift 3
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
  exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" --ntasks-per-node="$ranks_per_node" \
    --distribution=block:block --cpu-bind=none --wait=30 --open-mode=append --output="$logs/rank-%4t.txt" \
    "${SITE_LAUNCH[@]}" "$PYTHON" "$@"
}

# Waits for the ranks through any number of signals. Returns their exit code.
await_ranks() {
  local code
  while :; do
    code=0
    wait "$RANKS_PID" || code=$?
    kill -0 "$RANKS_PID" 2>/dev/null || return "$code"
  done
}

# Asks the ranks to stop at the next step boundary: they save, and `await_ranks` returns.
ask_to_stop() {
  # shellcheck disable=SC2034 # the job reads it
  STOPPING=true
  echo "$(date +%FT%T) asked to stop: the ranks save"
  [ -z "$RANKS_PID" ] || kill -USR1 "$RANKS_PID" 2>/dev/null || true
}
