"""Shard sets to models: training, export, evaluation, completions, publishing."""
