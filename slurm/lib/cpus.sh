# The CPUs of a node, divided among its ranks.
# shellcheck shell=bash

# Prints how many CPUs SLURM granted to the job on a node, the least if nodes differ: 96 of 128,96(x2).
cpus_per_node() {
  tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}" | sed 's/(.*//' | sort -n | head -n 1
}

# Prints the CPUs of each of this many ranks of a node: an equal part, which is 1 or even. SLURM gives a rank complete
# cores, of two CPUs on many nodes, and srun would wait forever if the ranks' cores were more than the node has.
cpus_per_rank() {
  local each=$(($(cpus_per_node) / $1))
  echo $((each > 1 ? each - each % 2 : 1))
}
