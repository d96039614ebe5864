# Every script here sources this file first: it loads lib/ and the site's settings. SCRIPTS is set to this folder.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

# shellcheck source=lib/arguments.sh
source "$SCRIPTS/lib/arguments.sh"
# shellcheck source=lib/accelerators.sh
source "$SCRIPTS/lib/accelerators.sh"
# shellcheck source=lib/cpus.sh
source "$SCRIPTS/lib/cpus.sh"
# shellcheck source=lib/jobs.sh
source "$SCRIPTS/lib/jobs.sh"

REPOSITORY=$(cd "$SCRIPTS/.." && pwd)
SITE_FILE=${SITE_FILE:-$SCRIPTS/site.sh}
[ -f "$SITE_FILE" ] || die "SITE_FILE is $SITE_FILE, which does not exist; it must be a file like slurm/site.sh."
# shellcheck disable=SC2034 # site.sh reads it
IN_JOB_SCRIPT=true
# shellcheck source=site.sh
source "$SITE_FILE"
if ! declare -F site_prepare >/dev/null; then # a file that sets some variables and does not source site.sh
  # shellcheck source=site.sh
  source "$SCRIPTS/site.sh"
  # shellcheck source=site.sh
  source "$SITE_FILE"
fi
if [ -z "${RUNS+set}" ] && [ "$ACCELERATORS_PER_NODE" = 0 ]; then
  ACCELERATORS_PER_NODE='' # a complete site.sh of an earlier version, in which 0 stood for what SLURM grants
fi
[[ $ACCELERATORS_PER_NODE =~ ^[0-9]*$ ]] ||
  die "ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE; it must be a number, or empty to ask SLURM."
# Earlier names of the variables.
RUNS=${RUNS:-${SITE_RUNS:-}}
SHARDS=${SHARDS:-${SITE_SHARDS:-}}
MAX_FAILURES=${MAX_FAILURES:-${MAX_ACCIDENTS:-3}}
PYTHON=${SITE_PYTHON:-$REPOSITORY/.venv/bin/python}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
export OMP_WAIT_POLICY=passive
