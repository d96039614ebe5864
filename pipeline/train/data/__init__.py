"""Which images a step trains on: a pure function of (seed, position), whatever the ranks and restarts.

Start at batches.py; streaming.py and stream_order.py are for shard sets at an address, masking.py for the masked
objective.
"""
