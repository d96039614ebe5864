# What every script here starts with: the site's settings and the functions of lib/. Sourced, with SCRIPTS set to this
# folder.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit

REPOSITORY=$(cd "$SCRIPTS/.." && pwd)
SITE_FILE=${SITE_FILE:-$SCRIPTS/site.sh}
# shellcheck source=site.sh
source "$SITE_FILE"
MAX_FAILURES=${MAX_FAILURES:-${MAX_ACCIDENTS:-3}} # its earlier name
PYTHON=${SITE_PYTHON:-$REPOSITORY/.venv/bin/python}
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
export OMP_WAIT_POLICY=passive

# shellcheck source=lib/arguments.sh
source "$SCRIPTS/lib/arguments.sh"
# shellcheck source=lib/jobs.sh
source "$SCRIPTS/lib/jobs.sh"
