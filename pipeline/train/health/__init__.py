"""Monitors the health of a run: skipped steps, hangs, slow ranks, diverged replicas, requests to stop.

Start at step_filter.py and watchdog.py. Each file has one check; pipeline/train/loop.py calls them.
"""
