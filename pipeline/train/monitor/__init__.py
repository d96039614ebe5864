"""What a run prints and records: summary.py before the first step, telemetry.py at each one.

A new number of every step is a key of the row that pipeline/train/loop.py gives telemetry.py.
"""
