# A site of 8 nodes with 8 accelerators each, for tests.
# shellcheck shell=bash
ACCELERATORS_PER_NODE=8
ACCELERATOR=h100-80gb
# shellcheck source=../../slurm/site.sh
source "$SCRIPTS/site.sh"
