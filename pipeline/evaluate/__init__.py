"""`evaluate` and `complete`: what a trained model learned, task by task.

Start at run.py, then task.py (what a task is) and context.py (what it is given). A new task is a file in tasks/ and a
line in registry.py.
"""
