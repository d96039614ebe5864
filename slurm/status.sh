#!/bin/bash
# Where a run stands, and its jobs in the queue: slurm/status.sh RUN
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"
[ $# -eq 1 ] || die "give one folder of a run: slurm/status.sh RUN"
if [ -e "$1/run.json" ]; then
  run_python -m pipeline status "$1"
else
  echo "$1 was not started yet"
fi
# Found by the run in their command; by the script alone where the run is the site's.
whole=$(realpath --canonicalize-missing "$1")
script=''
[ "${whole%/*}" != "$(realpath --canonicalize-missing "${SITE_RUNS:-/dev/null}")" ] || script=${whole##*/igpt_}
squeue --noheader --array \
  --Format='JobArrayID:.10 ,Name:16 ,State:10 ,RestartCnt:.4 ,TimeLeft:.12 ,ReasonList:24 ,Command:1024' 2>/dev/null |
  awk -v run="$1" -v whole="$whole" -v script="/pretrain_$script.sh " '
    function names(path) { return index($0 " ", "--run " path " ") || index($0 " ", "--run=" path " ") }
    names(run) || names(whole) || (index($0 " ", script) && !/ --run[ =]/) {
      if (!count++) print "  jobs: number, name, state, restarts, time left, nodes or reason"
      print "  " substr($0, 1, 82)
    }' || true
