# The settings of a site, and the one file to edit. Variables that are set before win over the defaults below.
# `source slurm/site.sh` in the shell that submits: sbatch reads its SBATCH_ variables, which win over the #SBATCH lines
# of the scripts; options on sbatch's command line win over both. Each job reads this file again on its nodes.
# SITE_FILE=/path/to/other.sh names another file: it sets variables, sources this one, then sets arrays and functions.
# shellcheck shell=bash disable=SC2034

# Where runs and shard sets are. `sbatch slurm/pretrain_xl.sh` trains the run $RUNS/igpt_xl (the recipe's name) on the
# shard set $SHARDS/64 (the recipe's resolution), or on $SHARDS if it is a shard set itself. --run and --data.shards
# name others.
RUNS=${RUNS:-}
SHARDS=${SHARDS:-}

# Account, partition and limits of the jobs. Without them the cluster's defaults apply.
# export SBATCH_ACCOUNT=vision
# export SBATCH_PARTITION=train
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_TIMELIMIT=24:00:00

# Accelerators of a node; each runs one rank. Empty: as many as SLURM lists for the partition (its GRES). 0: ranks run
# on CPUs, as many on a node as sbatch --ntasks-per-node says, even where SLURM grants accelerators.
ACCELERATORS_PER_NODE=${ACCELERATORS_PER_NODE:-}

# The accelerator's name in `python -m pipeline plan --help`; used only by dry runs.
ACCELERATOR=${ACCELERATOR:-h100-80gb}

# sbatch's options for jobs that other jobs submit: evaluations, and jobs that need no accelerator (publish, join
# shards).
SITE_EVALUATE=() # (--partition=small --gpus-per-node=4 --cpus-per-task=32); the ranks share these CPUs
SITE_CPU=()      # (--partition=cpu --gpus-per-node=0)

# The Python of the jobs. Empty: .venv of this checkout.
SITE_PYTHON=${SITE_PYTHON:-}

# Commands that a node runs before Python starts: modules, a container's mounts, a proxy. A dry run runs them too.
site_prepare() {
  # module load cuda/12.8
  :
}

# CPU threads of a rank. Without it: as many as sbatch --cpus-per-task says, or else the node's CPUs divided by its
# ranks, at most 8.
# export OMP_NUM_THREADS=8

# Prefix of each Python command, such as a container: (apptainer exec --nv image.sif)
SITE_LAUNCH=()

# Caches of remote shard sets, and of downloads from the hub.
# export IGPT_CACHE=/scratch/$USER/image-gpt
# export HF_HOME=/scratch/$USER/huggingface

# Network. NCCL finds its interface on most clusters; set the interface where it does not.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
# export GLOO_SOCKET_IFNAME=eth0

# false where users may not requeue jobs. Then submit with --array=1-20%1, or a chain of jobs, each with
# --dependency=afterany:JOB on the one before: each job resumes the run, and exits at once when the run is finished.
SITE_REQUEUES=${SITE_REQUEUES:-true}

# How often a job may be requeued; and after how many consecutive failures (a killed rank, a lost node, a hang) at the
# same step it fails (default 3).
MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_FAILURES=${MAX_FAILURES:-}

# Time limit, in seconds, of the all-reduce between a job's nodes before it trains, with the first import of torch on
# every node; 0 skips the health checks. And how many nodes a job may exclude.
PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-180}
MAX_EXCLUDED=${MAX_EXCLUDED:-4}

# Evaluation tasks that a finished training job submits for each saved checkpoint (slurm/evaluate.sh); empty: none.
EVALUATE=${EVALUATE:-}

# Where it then publishes the checkpoints (slurm/publish.sh): hub:ORG/NAME, or dir:PATH if nodes do not reach the hub;
# empty: nowhere.
PUBLISH=${PUBLISH:-}

# Keep this last: it sets SBATCH_GPUS_PER_NODE, so that sbatch requests ACCELERATORS_PER_NODE GPUs.
# shellcheck source=lib/accelerators.sh
[ -n "${IN_JOB_SCRIPT:-}" ] || source "$(dirname "${BASH_SOURCE[0]:-$0}")/lib/accelerators.sh"
request_accelerators
