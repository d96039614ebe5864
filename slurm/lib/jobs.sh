# What every job script does: start as a job or as a dry run, run Python, submit other jobs.
# shellcheck shell=bash

# Runs the script's function `job`, or with --dry-run (once --test) its function `dry_run`, with the other arguments.
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

# The pipeline's Python, in the container if there is one.
run_python() {
  "${SITE_LAUNCH[@]}" "$PYTHON" "$@"
}

# Prints the folders of a run's complete checkpoints, the oldest first. User error where there are none.
checkpoints_of() {
  local found # find fails where a folder is deleted while it lists
  found=$(find "$1/checkpoints" -maxdepth 1 -type d -name 'step-*[0-9]' 2>/dev/null | sort) || true
  [ -n "$found" ] || die "$1 holds no checkpoints; name the folder of a run."
  echo "$found"
}

# Submits a job without this job's own variables, which the other would take for its own. Prints the job's number.
submit_job() {
  local name number own=()
  for name in "${!SLURM_@}"; do
    [ "$name" = SLURM_CONF ] || own+=(--unset="$name")
  done
  if number=$(env "${own[@]}" sbatch --parsable "$@"); then
    echo "submitted job $number: sbatch $*" >&2
    echo "$number"
  else
    echo "not submitted from here; on a login node: sbatch $*" >&2
    return 1
  fi
}

# Prints what sbatch would be given, what it would take from the site's file, and SLURM's answer to both.
show_submission() {
  local settings
  settings=$(env | grep '^SBATCH_' | sort | paste -sd' ' || true)
  echo "would be submitted, after \`source $SITE_FILE\`: sbatch $(typed "$@")"
  echo "sbatch takes from there: ${settings:-nothing}"
  if command -v sbatch >/dev/null; then
    sbatch --test-only "$@" || die "SLURM does not take the script now (its answer is above); nothing was submitted."
  else
    echo "(there is no sbatch here to ask)"
  fi
}
