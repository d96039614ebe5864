# A site of 8 nodes with 8 accelerators each, for tests.
# shellcheck shell=bash disable=SC2034,SC1091
ACCELERATORS_PER_NODE=8
ACCELERATOR=h100-80gb
source "$SCRIPTS/site.sh"
