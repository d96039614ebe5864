"""What keeps a run sound: skipped steps, hangs, slow ranks, diverged replicas, requests to stop.

Start at step_filter.py and watchdog.py. Each file watches one thing; pipeline/train/loop.py calls them.
"""
