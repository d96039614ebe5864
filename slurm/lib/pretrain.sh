# The training job: checks its nodes, starts the ranks, and requeues itself until the run is finished.
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

# Trains with a recipe of configs/ until the run is finished, over any number of starts of this job.
pretrain() {
  run_script --config "$REPOSITORY/configs/$1.yaml" "${@:2}"
}

# The job; its arguments begin with the recipe.
job() {
  local run nodes ranks_per_node ranks since training code=0 action followed_log
  mapfile -d '' -t training < <(with_site_paths "$@")
  run=$(value_of --run "${training[@]}")
  [ -n "$run" ] || die "--run is not given; name the folder of the run, new or of an earlier job (or SITE_RUNS in site.sh)."
  nodes=$(node_names)
  ranks_per_node=$(ranks_per_node)
  ranks=$((SLURM_JOB_NUM_NODES * ranks_per_node))
  MASTER_ADDR=${nodes%%,*}
  # Below 32768, where Linux takes ports for anyone. The preflight uses the four ports that follow.
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 2500 * 5))
  export MASTER_ADDR MASTER_PORT
  site_prepare
  mkdir -p "$run/logs"
  echo "$(date +%FT%T) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $ranks ranks on $SLURM_JOB_NODELIST" |
    tee -a "$run/logs/jobs.txt"
  since=$(date -u +%FT%TZ)
  trap ask_to_stop USR1 TERM
  check_nodes "$run" "$since" "$nodes" "${training[@]}"
  [ -z "$STOPPING" ] || requeue_and_exit
  rm -rf "$run/stacks"
  tail --follow=name --retry --lines=0 "$run/logs/rank-0000.txt" 2>/dev/null &
  followed_log=$!
  run_ranks "$ranks" "$ranks_per_node" "$run/logs" -m pipeline train "${training[@]}" &
  RANKS_PID=$!
  [ -z "$STOPPING" ] || ask_to_stop # asked while they were started
  await_ranks || code=$?
  sleep 1
  kill "$followed_log" 2>/dev/null || true
  tail -n +1 "$run"/stacks/*.txt 2>/dev/null || true # of a run that hung; the next start deletes them
  action=$(next_action "$run" "$since" "$code" "the ranks")
  case $action in
    done) follow_up "$run" ;;
    requeue) requeue_and_exit ;;
    *) exit 1 ;;
  esac
}

# Prints the plan, and SLURM's answer to the script. Submits nothing.
dry_run() {
  local script nodes each training planned
  script=$SCRIPTS/$(basename "$0")
  nodes=$(awk -F= '/^#SBATCH --nodes=/ {print $2}' "$script")
  each=$((ACCELERATORS_PER_NODE > 0 ? ACCELERATORS_PER_NODE : 1))
  mapfile -d '' -t training < <(with_site_paths "$@")
  mapfile -d '' -t planned < <(without "--run" "${training[@]}")
  echo "$nodes nodes of $each ranks (ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE; sbatch --nodes=N takes other nodes)"
  run_python -m pipeline plan --accelerator "$ACCELERATOR" --ranks $((nodes * each)) --ranks_per_node "$each" "${planned[@]}"
  echo
  [ -z "$EVALUATE" ] || echo "after it, for each kept checkpoint: slurm/evaluate.sh --tasks $EVALUATE"
  [ -z "$PUBLISH" ] || echo "after that: slurm/publish.sh --to $PUBLISH"
  show_submission "$script" "${@:3}" # without the recipe
}

# The options of train, NUL-separated: those given, after the site's paths where they name none.
with_site_paths() {
  local recipe=$2 given=("${@:3}") resolution
  listed --config "$recipe"
  if [ -n "${SITE_RUNS:-}" ] && [ -z "$(value_of --run "${given[@]}")" ]; then
    listed --run "$SITE_RUNS/$(basename "$recipe" .yaml)"
  fi
  if [ -n "${SITE_SHARDS:-}" ] && [[ " ${given[*]}" != *\ --@(config|data.shards|data.mixture)* ]]; then
    resolution=$(value_of --model.resolution "${given[@]}")
    listed --data.shards "$SITE_SHARDS/${resolution:-$(sed -n 's/^model:.* resolution: \([0-9]*\).*/\1/p' "$recipe")}"
  fi
  listed "${given[@]}"
}
