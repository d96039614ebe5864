"""`shards` and `join`. Start at build.py, the job; plan.py assigns images to shards, merge.py writes the manifest."""
