"""Features of a model, as classifiers read them: start at pooled.py, which caches those of every layer."""
