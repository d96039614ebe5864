# What all job scripts share: running as a job or as a dry run, starting Python, submitting other jobs.
# shellcheck shell=bash

# Calls the script's function `job`, or with --dry-run (its earlier name: --test) `dry_run`, with the other arguments.
run_script() {
  local argument first dry=false others=()
  for argument in "$@"; do
    case $argument in
      --dry-run | --test) dry=true ;;
      *) others+=("$argument") ;;
    esac
  done
  if $dry; then
    dry_run "${others[@]}"
    return
  fi
  first=$(sed -n 's/^#SBATCH --array=\([0-9]*\)-.*/\1/p' "$0")
  if [ -n "$first" ] && [ -z "${SLURM_ARRAY_JOB_ID:-}" ]; then
    die "this is an array job: submit it with sbatch --array=$first-N, or add --dry-run."
  elif [ -z "${SLURM_JOB_ID:-}" ]; then
    die "this is a job script: submit it with sbatch, or add --dry-run to see what it would do."
  fi
  job "${others[@]}"
}

# Runs the pipeline's Python, in the container if there is one.
run_python() {
  "${SITE_LAUNCH[@]}" "$PYTHON" "$@"
}

# Runs site_prepare. User error if the pipeline's Python then does not exist, does not start or lacks a package that the
# job imports, given as arguments.
prepare_python() {
  local missing remedy="run \`make set-up\`, or set SITE_PYTHON in $SITE_FILE to a Python that has requirements.txt"
  site_prepare
  if [ ${#SITE_LAUNCH[@]} -eq 0 ] && ! command -v "$PYTHON" >/dev/null; then
    die "$PYTHON is not a program; $remedy."
  fi
  missing=$(run_python -c \
    'import sys; from importlib.util import find_spec; print(*(p for p in sys.argv[1:] if not find_spec(p)))' "$@") ||
    die "$(quoted "${SITE_LAUNCH[@]}" "$PYTHON") does not start (its message is above); $remedy."
  [ -z "$missing" ] || die "$PYTHON lacks the packages ${missing// /, }; $remedy."
}

# Prints the folders of a run's complete checkpoints, the oldest first. User error if there are none.
checkpoints_of() {
  local found # find fails if a folder is deleted while it lists
  found=$(find "$1/checkpoints/" -maxdepth 1 -type d -name 'step-*[0-9]' 2>/dev/null | sort) || true
  [ -n "$found" ] || die "$1 has no checkpoints; give the folder of a run."
  echo "$found"
}

# Submits a job, without the SLURM_ variables of this job in its environment. Prints the new job's id.
submit_job() {
  local name number own=()
  for name in "${!SLURM_@}"; do
    [ "$name" = SLURM_CONF ] || own+=(--unset="$name")
  done
  if number=$(env "${own[@]}" sbatch --parsable "$@"); then
    echo "submitted job $number: sbatch $*" >&2
    echo "$number"
  else
    echo "could not be submitted from this node; on a login node: sbatch $*" >&2
    return 1
  fi
}

# Prints the sbatch command, the site's variables that sbatch reads, and SLURM's answer to both.
show_submission() {
  local settings
  settings=$(env | grep '^SBATCH_' | sort | paste -sd' ' || true)
  echo "would be submitted, after \`source $SITE_FILE\`: sbatch $(quoted "$@")"
  echo "variables that sbatch reads: ${settings:-none}"
  if ! command -v sbatch >/dev/null; then
    echo "(sbatch is not installed here, so SLURM was not asked)"
  elif ! sbatch --test-only "$@"; then
    timeout 10 scontrol ping >/dev/null 2>&1 ||
      die "SLURM does not answer here (its message is above); all else was checked. Repeat this where sinfo works."
    die "SLURM does not accept the script (its message is above); nothing was submitted."
  fi
}
