# How many accelerators a node has: ACCELERATORS_PER_NODE, or what SLURM granted, or what it lists for the partition.
# shellcheck shell=bash

# Prints how many GPUs the nodes of a partition (empty: the default one) have by their GRES: 8; or 0 8 if nodes differ.
# Prints nothing without SLURM, and "unknown" if it does not answer. Other arguments are options of sinfo.
gpus_of_partition() {
  local lines partition=$1
  shift
  command -v sinfo >/dev/null || return 0
  lines=$(timeout 10 sinfo --noheader ${partition:+--partition="$partition"} --format='%P %G' "$@" 2>/dev/null) || {
    echo unknown
    return
  }
  awk -v default_only="$((${#partition} == 0))" '
      NF < 2 || (default_only && $1 !~ /\*$/) { next }
      {
        gpus = 0
        gsub(/\([^)]*\)/, "", $2) # sockets, and (null)
        count = split($2, resources, ",")
        for (i = 1; i <= count; i++)
          if (resources[i] ~ /^gpu(:|$)/) {
            fields = split(resources[i], field, ":") # gpu:8, gpu:h100:8
            gpus += field[fields] ~ /^[0-9]+$/ ? field[fields] : 1
          }
        print gpus
      }' <<<"$lines" | sort -nu | paste -sd' '
}

# Sets SBATCH_GPUS_PER_NODE for the shell that sources site.sh. Job scripts do not query the partition here.
request_accelerators() {
  local found=$ACCELERATORS_PER_NODE
  if [ -n "${GPUS_FROM_SITE:-}" ] && [ "${SBATCH_GPUS_PER_NODE:-}" = "$GPUS_FROM_SITE" ]; then
    unset SBATCH_GPUS_PER_NODE # from an earlier call; any other value is the user's
  fi
  [ -z "${SBATCH_GPUS_PER_NODE:-}" ] || return 0
  if [ -z "$found" ] && [ -z "${IN_JOB_SCRIPT:-}" ]; then
    found=$(gpus_of_partition "${SBATCH_PARTITION:-}")
  fi
  case $found in
    '' | 0) ;;
    unknown) echo "site.sh: SLURM does not answer; set ACCELERATORS_PER_NODE, or source it again." >&2 ;;
    *' '*) echo "site.sh: nodes have ${found// / or } accelerators; set ACCELERATORS_PER_NODE." >&2 ;;
    *) export SBATCH_GPUS_PER_NODE=$found GPUS_FROM_SITE=$found ;;
  esac
}

# For a dry run: sets ACCELERATORS_PER_NODE if it is empty, and ACCELERATORS_SOURCE to where the number is from.
# shellcheck disable=SC2034 # the dry run prints the source
find_accelerators() {
  local found partition='the default partition'
  [ -z "${SBATCH_PARTITION:-}" ] || partition="partition $SBATCH_PARTITION"
  if [ -n "$ACCELERATORS_PER_NODE" ]; then
    ACCELERATORS_SOURCE="ACCELERATORS_PER_NODE is $ACCELERATORS_PER_NODE"
    return
  fi
  found=$(gpus_of_partition "${SBATCH_PARTITION:-}")
  case $found in
    unknown)
      die "SLURM does not answer, so the accelerators of its nodes are unknown; set ACCELERATORS_PER_NODE in" \
        "$SITE_FILE (0: ranks run on CPUs)."
      ;;
    '' | 0)
      ACCELERATORS_SOURCE="SLURM lists no accelerators for $partition"
      ACCELERATORS_SOURCE+="; if nodes have some, set ACCELERATORS_PER_NODE in $SITE_FILE"
      ;;
    *' '*)
      die "the nodes of $partition have ${found// / or } accelerators; set ACCELERATORS_PER_NODE in $SITE_FILE to the" \
        "number that each node of a job has."
      ;;
    *) ACCELERATORS_SOURCE="SLURM lists $found accelerators a node for $partition" ;;
  esac
  ACCELERATORS_PER_NODE=${found:-0}
  request_accelerators
}

# For a job: if ACCELERATORS_PER_NODE is empty, sets it to the GPUs that SLURM granted (with --exclusive, all of a
# node). If it is 0, hides those from the ranks. User error if none were granted although the nodes have some, unless
# --ntasks-per-node requests CPU ranks.
find_granted_accelerators() {
  local listed=''
  if [ "$ACCELERATORS_PER_NODE" = 0 ]; then
    export CUDA_VISIBLE_DEVICES='' ROCR_VISIBLE_DEVICES=''
  elif [ -z "$ACCELERATORS_PER_NODE" ]; then
    ACCELERATORS_PER_NODE=${SLURM_GPUS_ON_NODE:-0}
    if [ "$ACCELERATORS_PER_NODE" -eq 0 ] && [ -z "${SLURM_NTASKS_PER_NODE:-}" ]; then
      listed=$(gpus_of_partition "${SLURM_JOB_PARTITION:-}" --nodes="$SLURM_JOB_NODELIST")
      [[ $listed = @(|0|unknown) ]] ||
        die "the nodes of the job have ${listed// / or } accelerators, and it was given none: \`source $SITE_FILE\`" \
          "before sbatch, or give sbatch --gpus-per-node; to train on CPUs, set ACCELERATORS_PER_NODE=0."
    fi
  fi
}
