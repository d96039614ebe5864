"""Logs and records a run: summary.py before the first step, telemetry.py and console.py at each step.

To record another number at every step, add a key to the row that pipeline/train/loop.py passes to telemetry.py.
"""
