# How many accelerators a node has: ACCELERATORS_PER_NODE, or what SLURM granted, or what it lists for the partition.
# shellcheck shell=bash

# Prints how many GPUs the nodes of a partition (empty: the default one) have by their GRES: 8; or 4 8 if nodes differ.
# Prints nothing if they have none or SLURM does not answer.
gpus_of_partition() {
  command -v sinfo >/dev/null || return 0
  timeout 10 sinfo --noheader ${1:+--partition="$1"} --format='%P %G' 2>/dev/null |
    awk -v default_only="$((${#1} == 0))" '
      default_only && $1 !~ /\*$/ { next }
      {
        gpus = 0
        gsub(/\([^)]*\)/, "", $2) # sockets, and (null)
        count = split($2, resources, ",")
        for (i = 1; i <= count; i++)
          if (resources[i] ~ /^gpu(:|$)/) {
            fields = split(resources[i], field, ":") # gpu:8, gpu:h100:8
            gpus += field[fields] ~ /^[0-9]+$/ ? field[fields] : 1
          }
        if (gpus) print gpus
      }' | sort -nu | paste -sd' ' || true
}

# Has sbatch ask for a node's accelerators, in the shell that sources site.sh; a job script asks SLURM only where it
# needs the number.
request_accelerators() {
  local found=$ACCELERATORS_PER_NODE
  if [ -z "$found" ] && [ -z "${IN_JOB_SCRIPT:-}" ]; then
    found=$(gpus_of_partition "${SBATCH_PARTITION:-}")
  fi
  case $found in
    '' | 0) ;;
    *' '*) echo "site.sh: nodes have ${found// / or } accelerators; set ACCELERATORS_PER_NODE." >&2 ;;
    *) export SBATCH_GPUS_PER_NODE=$found ;;
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
    '')
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

# For a job: sets ACCELERATORS_PER_NODE to what SLURM granted, if it is empty; the scripts' --exclusive is granted all
# that a node has. User error if the job was given none on nodes that have some, unless --ntasks-per-node asked for CPU
# ranks.
find_granted_accelerators() {
  local granted=${SLURM_GPUS_ON_NODE:-0} listed=''
  [ -z "$ACCELERATORS_PER_NODE" ] || return 0
  ACCELERATORS_PER_NODE=0
  if [ "$granted" -eq 0 ] && [ -z "${SLURM_NTASKS_PER_NODE:-}" ]; then
    listed=$(gpus_of_partition "${SLURM_JOB_PARTITION:-}")
    [ -z "$listed" ] ||
      die "the nodes of the job have ${listed// / or } accelerators, and the job was given none: \`source $SITE_FILE\`" \
        "before sbatch, or give sbatch --gpus-per-node; to train on CPUs, set ACCELERATORS_PER_NODE=0."
  elif [ "$granted" -gt 0 ] && has_gpu_devices; then
    ACCELERATORS_PER_NODE=$granted
  elif [ "$granted" -gt 0 ]; then
    echo "SLURM granted $granted accelerators a node, but this node has no device of a GPU: the ranks run on CPUs"
  fi
  request_accelerators
}

# Whether this node has the device files of NVIDIA's or AMD's driver.
has_gpu_devices() {
  compgen -G '/dev/nvidia[0-9]*' >/dev/null || [ -e /dev/kfd ]
}
