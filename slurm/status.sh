#!/bin/bash
# Where a run stands, and its jobs in the queue: slurm/status.sh RUN
SCRIPTS=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=common.sh
source "$SCRIPTS/common.sh"
[ $# -eq 1 ] || die "give one folder of a run: slurm/status.sh RUN"
"$PYTHON" -m pipeline status "$1"
jobs=$(awk '/ job [0-9]+, start / {sub(",", "", $3); print $3}' "$1/logs/jobs.txt" 2>/dev/null | sort -un | paste -sd,)
[ -z "$jobs" ] || squeue --noheader --format="  job       %i %T on %N %r, %L left" --jobs="$jobs" 2>/dev/null || true
