"""Metrics: accuracies, Fréchet distances, predictions under several masks. They do not depend on the tasks."""
