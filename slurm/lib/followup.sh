# The jobs that follow a finished run: its evaluation and its publishing.
# shellcheck shell=bash

# Submits the evaluation of all saved checkpoints, if EVALUATE names tasks, then their publishing, if PUBLISH names a
# destination. Each combination of last checkpoint, EVALUATE and PUBLISH is submitted once.
follow_up() {
  local run=$1 request shards tasks found checkpoints evaluation dependency=() results=()
  [ -n "$EVALUATE$PUBLISH" ] || return 0
  found=$(checkpoints_of "$run") || return 0
  mapfile -t checkpoints <<<"$found"
  request="$(basename "${checkpoints[-1]}") EVALUATE=$EVALUATE PUBLISH=$PUBLISH"
  if grep -qxF "$request" "$run/logs/followed.txt" 2>/dev/null; then
    echo "not submitted again, because $run/logs/followed.txt lists it: $request"
    return
  fi
  if [ -n "$EVALUATE" ]; then
    shards=$(run_python -c 'import json, sys; print(json.load(open(sys.argv[1]))["shards"]["path"])' "$run/run.json")
    tasks=$(tr ',' '\n' <<<"$EVALUATE" | wc -l)
    evaluation=$(submit_job "${SITE_EVALUATE[@]}" --array="0-$((${#checkpoints[@]} * tasks - 1))" "$SCRIPTS/evaluate.sh" \
      --run "$run" --shards "$shards" --out "$run/results" --tasks "$EVALUATE") || return 0
    dependency=(--dependency="afterok:$evaluation" --kill-on-invalid-dep=yes)
    results=(--results "$run/results")
  fi
  if [ -n "$PUBLISH" ]; then
    submit_job "${SITE_CPU[@]}" "${dependency[@]}" "$SCRIPTS/publish.sh" --run "$run" "${results[@]}" --to "$PUBLISH" \
      >/dev/null || return 0
  fi
  echo "$request" >>"$run/logs/followed.txt"
}
