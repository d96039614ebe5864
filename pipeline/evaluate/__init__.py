"""The commands `evaluate` and `complete`: evaluation tasks on a trained model.

Start at run.py, then read task.py (the base class of tasks) and context.py (what a task receives). To add a task, add a
file to tasks/ and a line to registry.py; README.md has an example.
"""
