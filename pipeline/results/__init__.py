"""The results folder and its views: headlines, figures, results.json (schema.py), and the report (report/).

The headlines and the report section of a task are methods of its class (pipeline/evaluate/task.py).
"""
