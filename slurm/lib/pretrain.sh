# The training job: it checks its nodes, starts the ranks, and requeues itself until the run is finished.
# shellcheck shell=bash

# shellcheck source=common.sh
source "$SCRIPTS/common.sh"
# shellcheck source=lib/nodes.sh
source "$SCRIPTS/lib/nodes.sh"
# shellcheck source=lib/ranks.sh
source "$SCRIPTS/lib/ranks.sh"
# shellcheck source=lib/requeue.sh
source "$SCRIPTS/lib/requeue.sh"
# shellcheck source=lib/followup.sh
source "$SCRIPTS/lib/followup.sh"

PACKAGES=(deepspeed jsonargparse numpy safetensors torch transformers yaml)

# Trains with a recipe of configs/ until the run is finished, across any number of starts of this job.
pretrain() {
  run_script --config "$REPOSITORY/configs/$1.yaml" "${@:2}"
}

# The job. Its first arguments are --config RECIPE.
job() {
  local run nodes ranks_per_node ranks since code=0 action followed_log
  [ -z "$(value_of --nodes "$@")" ] ||
    die "--nodes is an option of sbatch: give it before the script, sbatch --nodes=N $(basename "$0")."
  set_training_options "$@"
  run=$(value_of --run "${TRAINING[@]}")
  find_granted_accelerators
  nodes=$(node_names)
  ranks_per_node=$(ranks_per_node)
  ranks=$((SLURM_JOB_NUM_NODES * ranks_per_node))
  MASTER_ADDR=${nodes%%,*}
  # Below 32768, where Linux assigns ports to any program. The health check uses the four ports that follow.
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 2500 * 5))
  export MASTER_ADDR MASTER_PORT
  prepare_python "${PACKAGES[@]}"
  mkdir -p "$run/logs"
  echo "$(date +%FT%T) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks on $SLURM_JOB_NODELIST" |
    tee -a "$run/logs/jobs.txt"
  since=$(date -u +%FT%TZ)
  trap ask_to_stop USR1 TERM
  check_nodes "$run" "$since" "$nodes" "${TRAINING[@]}"
  [ -z "$STOPPING" ] || requeue_and_exit
  rm -rf "$run/stacks"
  tail --follow=name --retry --lines=0 "$run/logs/rank-0000.txt" 2>/dev/null &
  followed_log=$!
  run_ranks "$ranks" "$ranks_per_node" "$run/logs" -m pipeline train "${TRAINING[@]}" &
  RANKS_PID=$!
  [ -z "$STOPPING" ] || ask_to_stop # the signal came while they were started
  await_ranks || code=$?
  sleep 1
  kill "$followed_log" 2>/dev/null || true
  tail -n +1 "$run"/stacks/*.txt 2>/dev/null || true # stacks of a run that hung; the next start deletes them
  action=$(next_action "$run" "$since" "$code" "the ranks")
  case $action in
    done) follow_up "$run" ;;
    requeue) requeue_and_exit ;;
    *) exit 1 ;;
  esac
}

# Checks the options, prints the plan, and SLURM's answer to the script. Submits nothing. --nodes stands for sbatch's.
dry_run() {
  local script nodes each given planned of_sbatch=()
  nodes=$(value_of --nodes "$@")
  [[ $nodes =~ ^([1-9][0-9]*)?$ ]] || die "--nodes is $nodes; it must be a number of nodes."
  mapfile -d '' -t given < <(without_options "--nodes" "$@")
  set_training_options "${given[@]}"
  find_accelerators
  prepare_python "${PACKAGES[@]}"
  script=$SCRIPTS/$(basename "$0")
  [ -z "$nodes" ] || of_sbatch=(--nodes="$nodes")
  nodes=${nodes:-$(awk -F= '/^#SBATCH --nodes=/ {print $2}' "$script")}
  each=$((ACCELERATORS_PER_NODE > 0 ? ACCELERATORS_PER_NODE : 1))
  run_python -m pipeline preflight --quiet "${TRAINING[@]}"
  echo "run $(value_of --run "${TRAINING[@]}")${SHARD_SET:+, shard set $SHARD_SET}"
  echo "$nodes nodes of $each ranks (sbatch --nodes=N changes the nodes): $ACCELERATORS_SOURCE"
  mapfile -d '' -t planned < <(without_options "--run --resume_from" "${TRAINING[@]}")
  [ "$ACCELERATORS_PER_NODE" -gt 0 ] || ACCELERATOR=cpu
  run_python -m pipeline plan --accelerator "$ACCELERATOR" --ranks $((nodes * each)) --ranks_per_node "$each" "${planned[@]}"
  echo
  [ -z "$EVALUATE" ] || echo "then, for each saved checkpoint: slurm/evaluate.sh --tasks $EVALUATE"
  [ -z "$PUBLISH" ] || echo "then: slurm/publish.sh --to $PUBLISH"
  show_submission "${of_sbatch[@]}" "$script" "${given[@]:2}" # without the recipe
}

# Sets TRAINING to the options of train: --config RECIPE; the run and the shard set that RUNS and SHARDS name, unless
# the other arguments name them; the other arguments. Sets SHARD_SET to the shard set if it can be known here. User
# error if nothing names them.
set_training_options() {
  local recipe=$2 given=("${@:3}") names=() things=() options=() resolution
  SHARD_SET=$(value_of --data.shards "${given[@]}")
  SHARD_SET=${SHARD_SET:-$(value_of --data.mixture "${given[@]}")}
  TRAINING=(--config "$recipe")
  if [ -n "$(value_of --run "${given[@]}")" ]; then
    : # the user's
  elif [ -n "$RUNS" ]; then
    TRAINING+=(--run "$RUNS/$(basename "$recipe" .yaml)")
  else
    names+=(RUNS) things+=(runs) options+=(--run)
  fi
  if [[ " ${given[*]}" = *\ --@(config|data.shards|data.mixture|data=|data\ )* ]] ||
    sed -n '/^data:/,/^[^ #]/{/^data:/p;/^ /p}' "$recipe" | grep -Eq '^[^#]*shards:'; then
    : # the user's, or the recipe's
  elif [ -n "$SHARDS" ]; then
    resolution=$(value_of --model.resolution "${given[@]}")
    SHARD_SET=$SHARDS/${resolution:-$(sed -n 's/^model:.* resolution: \([0-9]*\).*/\1/p' "$recipe")}
    [ ! -e "$SHARDS/shards.json" ] || SHARD_SET=$SHARDS
    TRAINING+=(--data.shards "$SHARD_SET")
  else
    names+=(SHARDS) things+=("shard sets") options+=(--data.shards)
  fi
  [ ${#names[@]} -eq 0 ] ||
    die "set $(joined "${names[@]}") in $SITE_FILE to where your $(joined "${things[@]}") are, or give" \
      "$(joined "${options[@]}")."
  TRAINING+=("${given[@]}")
}
