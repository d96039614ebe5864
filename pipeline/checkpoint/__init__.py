"""A run's folder and its checkpoints: fragments of parameters that any topology loads.

Start at format.py (how a checkpoint is written, verified and committed), then fragments.py (what is in it) and
run_folder.py.
"""
