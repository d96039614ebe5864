"""The evaluation tasks, one a file; its docstring names the keys of the task's JSON.

To add one, start from knn.py: a subclass of Task (pipeline/evaluate/task.py), and its line in
pipeline/evaluate/registry.py.
"""
