"""Results on disk, and what is made of them: headlines, figures, results.json (schema.py), and the report (report/).

A task's headlines and section of the report are methods of its class (pipeline/evaluate/task.py).
"""
