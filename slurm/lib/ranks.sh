# The ranks of a training job: starting them, waiting for them, and asking them to stop.
# shellcheck shell=bash

# Shared between the signal handler and the job: whether it was asked to stop, and the process of srun.
STOPPING=''
RANKS_PID=''

# Threads of a rank, if neither OMP_NUM_THREADS nor --cpus-per-task sets them: more seldom help.
MOST_THREADS=8

# Prints how many ranks a node runs: as many as sbatch --ntasks-per-node sets, or ACCELERATORS_PER_NODE, or on CPUs as
# sbatch --ntasks sets. User error if the nodes would have different numbers.
ranks_per_node() {
  local each=${SLURM_NTASKS_PER_NODE:-0} nodes=$SLURM_JOB_NUM_NODES gpus
  if [ "$ACCELERATORS_PER_NODE" -gt "${SLURM_GPUS_ON_NODE:-0}" ]; then
    die "ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE, but the job was given ${SLURM_GPUS_ON_NODE:-none}:" \
      "\`source $SITE_FILE\` before sbatch, or give sbatch --gpus-per-node=$ACCELERATORS_PER_NODE."
  fi
  if [ "$each" -eq 0 ] && [ $((${SLURM_NTASKS:-$nodes} % nodes)) -ne 0 ]; then
    die "the job has $SLURM_NTASKS tasks (--ntasks) on $nodes nodes; each node must run as many: give sbatch" \
      "--ntasks-per-node, or a multiple of $nodes."
  fi
  [ "$each" -gt 0 ] || each=$ACCELERATORS_PER_NODE
  [ "$each" -gt 0 ] || each=$((${SLURM_NTASKS:-$nodes} / nodes))
  # Of all nodes, 3 or h100:3; only with sbatch --gpus. Several types (a100:2,h100:2) are not checked.
  gpus=${SLURM_GPUS:-}
  [[ $gpus == *,* ]] && gpus=''
  gpus=${gpus##*:}
  if [[ $gpus =~ ^[0-9]+$ ]] && [ "$gpus" -lt $((nodes * ACCELERATORS_PER_NODE)) ]; then
    die "the job has $gpus accelerators (--gpus) on $nodes nodes, and the first has $ACCELERATORS_PER_NODE; each node" \
      "must have as many: give sbatch --gpus-per-node instead."
  fi
  echo "$each"
}

# Replaces this shell by srun, which starts one process per rank; call it in the background. Consecutive ranks are on the
# same node, so that the stages of a pipeline are neighbors. srun kills the other ranks 30 s after the first one ended;
# earlier, the message and the exit code of a user error would be lost.
# A rank gets the CPUs of --cpus-per-task, or an equal part of the node's: srun would give it one. It binds itself to
# those close to its accelerator.
run_ranks() {
  local ranks=$1 ranks_per_node=$2 logs=$3 cpus threads
  shift 3
  cpus=${SLURM_CPUS_PER_TASK:-$(cpus_per_rank "$ranks_per_node")}
  threads=${SLURM_CPUS_PER_TASK:-$((cpus < MOST_THREADS ? cpus : MOST_THREADS))}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
  unset SLURM_CPUS_PER_GPU # srun accepts either this or --cpus-per-task
  exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" --ntasks-per-node="$ranks_per_node" \
    --distribution=block:block --cpus-per-task="$cpus" --cpu-bind=none --wait=30 --open-mode=append \
    --output="$logs/rank-%4t.txt" "${SITE_LAUNCH[@]}" "$PYTHON" "$@"
}

# Waits for the ranks, also across signals. Returns their exit code.
await_ranks() {
  local code
  while :; do
    code=0
    wait "$RANKS_PID" || code=$?
    kill -0 "$RANKS_PID" 2>/dev/null || return "$code"
  done
}

# Asks the ranks to save and stop after the current step; then `await_ranks` returns.
ask_to_stop() {
  # shellcheck disable=SC2034 # the job reads it
  STOPPING=true
  echo "$(date +%FT%T) asked to stop: the ranks save"
  [ -z "$RANKS_PID" ] || kill -USR1 "$RANKS_PID" 2>/dev/null || true
}
