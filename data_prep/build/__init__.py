"""`shards` and `join`: start at build.py, the job; plan.py says which images go where, merge.py ends it."""
