"""Training steps: ours, and those of libraries that train such a model."""
