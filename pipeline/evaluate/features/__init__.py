"""Features of a model, the input of classifiers. Start at pooled.py, which caches the features of every layer."""
