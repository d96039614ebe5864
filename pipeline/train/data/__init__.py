"""The data order and its readers: the images of a step are a pure function of (seed, position).

Start at batches.py, which reads a local shard set. streaming.py and stream_order.py are for shard sets at an address,
mixture.py and the files that its docstring names are for several sets together, masking.py is for the masked objective,
verify.py compares the shards with their digests.
"""
