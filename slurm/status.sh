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
squeue --noheader --array --Format='JobID:.10 ,Name:16 ,State:10 ,RestartCnt:.4 ,TimeLeft:.12 ,ReasonList:24 ,Command:1024' |
  awk -v run="$1" -v whole="$(realpath "$1")" 'BEGIN {print "  jobs in the queue: number, name, state, restarts, time left, nodes or reason"}
    index($0 " ", "--run " run " ") || index($0 " ", "--run=" run " ") || index($0 " ", "--run " whole " ") || index($0 " ", "--run=" whole " ") {
      print "  " substr($0, 1, 80)}'
