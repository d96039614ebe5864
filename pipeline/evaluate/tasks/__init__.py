"""The evaluation tasks, one per file. Each file's docstring documents the keys of the task's JSON.

To add a task, start from knn.py: write a subclass of Task (pipeline/evaluate/task.py) and add its line to
pipeline/evaluate/registry.py.
"""
