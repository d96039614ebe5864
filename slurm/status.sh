#!/bin/bash
# Prints a run's progress and its jobs in the queue: slurm/status.sh RUN
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"
[ $# -eq 1 ] || die "give one argument, the run's folder: slurm/status.sh RUN"
if [ -e "$1/run.json" ]; then
  run_python -m pipeline status "$1"
else
  echo "$1 has not started yet"
fi
# A job belongs to the run if its command has --run RUN; without --run, if its script's run in RUNS is this one.
absolute=$(realpath --canonicalize-missing "$1")
recipe=''
[ "${absolute%/*}" != "$(realpath --canonicalize-missing "${RUNS:-/dev/null}")" ] || recipe=${absolute##*/igpt_}
squeue --noheader --array \
  --Format='JobArrayID:.10 ,Name:16 ,State:10 ,RestartCnt:.4 ,TimeLeft:.12 ,ReasonList:24 ,Command:1024' 2>/dev/null |
  awk -v run="$1" -v absolute="$absolute" -v script="/pretrain_$recipe.sh " '
    function names(path) { return index($0 " ", "--run " path " ") || index($0 " ", "--run=" path " ") }
    names(run) || names(absolute) || (index($0 " ", script) && !/ --run[ =]/) {
      if (!count++) print "  jobs: number, name, state, restarts, time left, nodes or reason"
      print "  " substr($0, 1, 82)
    }' || true
