# The one file that a site edits. `source slurm/site.sh` in the shell that submits: sbatch takes its SBATCH_ variables
# in place of the scripts' own options, and what stands on its command line in place of both. The jobs read this file
# again on their nodes. SITE_FILE=/path/to/other.sh names another.
# shellcheck shell=bash disable=SC2034

# Where jobs are sent. Empty: the cluster's defaults.
# export SBATCH_ACCOUNT=vision
# export SBATCH_PARTITION=train
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100
# export SBATCH_TIMELIMIT=24:00:00

# Accelerators (and so ranks) of a node, and their kind as `python -m pipeline plan` knows it. 0: CPUs, and as many ranks
# a node as --ntasks-per-node says.
ACCELERATORS_PER_NODE=${ACCELERATORS_PER_NODE:-0}
ACCELERATOR=${ACCELERATOR:-h100-80gb}
if [ "$ACCELERATORS_PER_NODE" -gt 0 ]; then
  export SBATCH_GPUS_PER_NODE=$ACCELERATORS_PER_NODE
fi

# Options of sbatch for jobs that jobs submit: evaluations; and what needs no accelerator, publishing and joining shards.
SITE_EVALUATE=() # (--partition=small --gpus-per-node=1)
SITE_CPU=()      # (--partition=cpu --gpus-per-node=0)

# The Python of the jobs. Empty: .venv of this checkout.
SITE_PYTHON=${SITE_PYTHON:-}

# What a node needs before Python starts: modules, a container's mounts, a proxy.
site_prepare() {
  # module load cuda/12.8
  :
}

# Put before each rank's Python, for a container: (apptainer exec --nv image.sif)
SITE_LAUNCH=()

# Where runs and shard sets lie. A training job without --run takes SITE_RUNS/igpt_xl (its recipe), one without
# --data.shards (and without --config) SITE_SHARDS/64 (its resolution).
SITE_RUNS=${SITE_RUNS:-}
SITE_SHARDS=${SITE_SHARDS:-}

# Paths: copies of remote shard sets, and of what comes from the hub.
# export IGPT_CACHE=/scratch/$USER/image-gpt
# export HF_HOME=/scratch/$USER/huggingface

# Network. NCCL finds its interface on most clusters; name the interface where it does not.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
# export GLOO_SOCKET_IFNAME=eth0

# false where users may not requeue jobs: then submit with --array=1-20%1, whose later copies resume the run and exit at
# once when it is finished; or as a chain, each with --dependency=afterany:JOB on the one before.
SITE_REQUEUES=${SITE_REQUEUES:-true}

# How often one job may be requeued, and how many failures (a killed rank, a lost node, a hang) may follow each other
# without a further step; empty: 3.
MAX_RESTARTS=${MAX_RESTARTS:-100}
MAX_FAILURES=${MAX_FAILURES:-}

# Seconds in which the all-reduce between the nodes of a job must succeed before it trains; 0 checks no node. And how many
# bad nodes one job may exclude.
PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-60}
MAX_EXCLUDED=${MAX_EXCLUDED:-4}

# Evaluation tasks that follow a finished training for each of its kept checkpoints (slurm/evaluate.sh); empty: none.
EVALUATE=${EVALUATE:-}

# Where the checkpoints go after that (slurm/publish.sh): hub:ORG/NAME, or dir:PATH where nodes reach no hub; empty:
# nowhere.
PUBLISH=${PUBLISH:-}
